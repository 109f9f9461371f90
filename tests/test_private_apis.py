"""The private parts of libraries that the program uses; a new release may change them."""

from importlib.metadata import version
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

# Library, what is used of it, the file that uses it, the release it was last seen in.
PRIVATE = [
    ("torch", "optimizer.found_inf", "training/step.py", "2.14.1"),  # GradScaler hands it to fused optimizers
    ("torch", "torch._dynamo.exc.TorchDynamoException", "training/step.py", "2.14.1"),  # the base of --compile's errors
]


@pytest.mark.parametrize(("library", "name", "file", "release"), PRIVATE)
def test_a_private_part_is_used_where_the_table_says(library, name, file, release):
    assert name in (SRC / file).read_text(), (
        f"{file} no longer uses {name} of {library} {release}: remove it from the table"
    )


def test_torch_still_has_what_the_program_uses():
    import torch
    from torch.amp import GradScaler

    release = version("torch")
    base = getattr(torch._dynamo.exc, "TorchDynamoException", None)
    assert base is not None, f"torch {release} has no torch._dynamo.exc.TorchDynamoException: see training/step.py"
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([parameter], lr=0.1, fused=True), GradScaler("cpu")
    seen = []
    optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(hasattr(optimizer, "found_inf")))
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert seen == [True], f"torch {release} hands no found_inf to fused optimizers: see training/step.py"
