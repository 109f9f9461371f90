"""Training schedules for small data sets; the published schedule is for COCO's 117,266 training images."""

import math
from typing import NamedTuple


class Recipe(NamedTuple):
    """The schedule for a data set of about `pictures` training pictures."""

    pictures: int
    epochs: int
    multistep: tuple[int, ...]
    warmup: int  # iterations
    batch_size: int  # 0.13 GB of GPU memory a picture with --fp16: 32 take 4.2 GB and fit a GPU of 8 GB

    def iterations(self, pictures: int) -> int:
        """The iterations of a run of one process on so many training pictures."""
        return self.epochs * math.ceil(pictures / self.batch_size)

    @property
    def evaluation(self) -> list[int]:
        """Epochs after which to evaluate: halfway, before each drop of the learning rate, and the last."""
        return sorted({self.epochs // 2 - 1, *(epoch - 1 for epoch in self.multistep), self.epochs - 1})

    @property
    def flags(self) -> str:
        return (
            f"--epochs {self.epochs} --multistep {' '.join(map(str, self.multistep))} --warmup {self.warmup} "
            f"--batch-size {self.batch_size} --evaluation {' '.join(map(str, self.evaluation))} --fp16"
        )


# From 60 pictures on, the closest recipe has at least 3,000 iterations.  As in the published schedule, the rate drops
# after two thirds and after five sixths of the run.
RECIPES = (
    Recipe(pictures=100, epochs=400, multistep=(265, 335), warmup=300, batch_size=8),
    Recipe(pictures=500, epochs=250, multistep=(165, 210), warmup=300, batch_size=16),
    Recipe(pictures=2_000, epochs=100, multistep=(65, 85), warmup=500, batch_size=32),
    Recipe(pictures=10_000, epochs=30, multistep=(20, 25), warmup=500, batch_size=32),
)


def closest_recipe(pictures: int) -> Recipe:
    """The recipe whose number of pictures is closest, by ratio."""
    return min(RECIPES, key=lambda recipe: abs(math.log(recipe.pictures / max(1, pictures))))
