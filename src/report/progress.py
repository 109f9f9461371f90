"""Progress bars for a terminal."""

import threading

from tqdm import tqdm

FORM = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
TRAINING_FORM = FORM + ", {speed} images/s"


class Bar(tqdm):
    """A progress bar without tqdm's helper thread and semaphore, which every forked worker would inherit.

    It is wiped when it is closed, so that the lines printed meanwhile are what stays.
    """

    monitor_interval = 0

    def __init__(self, total: int, name: str, *, initial: int = 0, form: str = FORM) -> None:
        super().__init__(
            total=total, desc=name, initial=initial, bar_format=form, dynamic_ncols=True, leave=False, miniters=1
        )


Bar.set_lock(threading.RLock())  # tqdm's own includes the semaphore


class TrainingBar(Bar):
    """A bar of iterations that tells the images a second too."""

    images = 0  # of an iteration, in all processes

    def __init__(self, total: int, name: str, *, initial: int = 0) -> None:
        super().__init__(total, name, initial=initial, form=TRAINING_FORM)

    @property
    def format_dict(self) -> dict:
        """What the form may name; tqdm's hook."""
        values = super().format_dict
        seconds = values["elapsed"]
        iterations_per_second = values["rate"] or ((self.n - self.initial) / seconds if seconds else 0)
        speed = iterations_per_second * self.images
        return {**values, "speed": f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"}


class NullBar:
    """A bar that is not shown."""

    def __enter__(self) -> "NullBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, steps: int = 1) -> None:
        pass
