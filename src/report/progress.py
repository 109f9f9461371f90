"""Progress bars for a terminal."""

import threading

from tqdm import tqdm

FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
TRAINING_FORMAT = FORMAT + ", {speed} images/s"


class Bar(tqdm):
    """A progress bar without tqdm's helper thread and semaphore, which every forked worker would inherit.

    Closing it erases it, so that only printed lines stay on the terminal.
    """

    monitor_interval = 0

    def __init__(self, total: int, name: str, *, initial: int = 0, bar_format: str = FORMAT) -> None:
        super().__init__(
            total=total, desc=name, initial=initial, bar_format=bar_format, dynamic_ncols=True, leave=False, miniters=1
        )


Bar.set_lock(threading.RLock())  # tqdm's default lock includes the semaphore


class TrainingBar(Bar):
    """A bar of iterations that also shows images/s."""

    images = 0  # per iteration, in all processes

    def __init__(self, total: int, name: str, *, initial: int = 0) -> None:
        super().__init__(total, name, initial=initial, bar_format=TRAINING_FORMAT)

    @property
    def format_dict(self) -> dict:
        """The values that bar_format may use; tqdm calls this."""
        values = super().format_dict
        seconds = values["elapsed"]
        iterations_per_second = values["rate"] or ((self.n - self.initial) / seconds if seconds else 0)
        speed = iterations_per_second * self.images
        return {**values, "speed": f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"}


class NullBar:
    """The bar without a terminal: shows nothing."""

    def __enter__(self) -> "NullBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, steps: int = 1) -> None:
        pass
