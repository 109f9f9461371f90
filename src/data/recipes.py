"""Schedules for small data sets: the published one is for COCO's 117,266 training images."""

import math
from typing import NamedTuple


class Recipe(NamedTuple):
    """Flags that fit a number of training pictures."""

    pictures: int
    epochs: int
    multistep: tuple[int, ...]
    warmup: int  # iterations
    batch_size: int  # takes 0.13 GB a picture with --fp16: 4.2 GB at 32, on a GPU of 8 GB

    def iterations(self, pictures: int) -> int:
        """Of a run with so many training pictures on one process."""
        return self.epochs * math.ceil(pictures / self.batch_size)

    @property
    def evaluation(self) -> list[int]:
        """Epochs after which to evaluate: halfway, before each drop of the rate and after the last."""
        return sorted({self.epochs // 2 - 1, *(epoch - 1 for epoch in self.multistep), self.epochs - 1})

    @property
    def flags(self) -> str:
        return (
            f"--epochs {self.epochs} --multistep {' '.join(map(str, self.multistep))} --warmup {self.warmup} "
            f"--batch-size {self.batch_size} --evaluation {' '.join(map(str, self.evaluation))} --fp16"
        )


# Each has 3,000 iterations or more also for the fewest pictures that it fits (but for fewer than 60), and the rate
# falls at two thirds and at five sixths of the run, as in the published schedule.
RECIPES = (
    Recipe(pictures=100, epochs=400, multistep=(265, 335), warmup=300, batch_size=8),
    Recipe(pictures=500, epochs=250, multistep=(165, 210), warmup=300, batch_size=16),
    Recipe(pictures=2_000, epochs=100, multistep=(65, 85), warmup=500, batch_size=32),
    Recipe(pictures=10_000, epochs=30, multistep=(20, 25), warmup=500, batch_size=32),
)


def fitting_recipe(pictures: int) -> Recipe:
    """The recipe of the nearest number of pictures, by ratio."""
    return min(RECIPES, key=lambda recipe: abs(math.log(recipe.pictures / max(1, pictures))))
