import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from src.flags import EVALUATION_EPOCHS, Flags, make_parser, parse_args

README = Path(__file__).parents[1] / "README.rst"
# The frozen part: option strings, default, and what a sample value is read as.
DOCUMENTED = {
    "data": (["--data", "-d"], None),
    "epochs": (["--epochs", "-e"], 65),
    "batch_size": (["--batch-size", "--bs", "-b"], 32),
    "eval_batch_size": (["--eval-batch-size", "--ebs"], 32),
    "seed": (["--seed", "-s"], 0),
    "evaluation": (["--evaluation"], [3, 21, 31, 37, 42, 48, 53, 59, 64]),
    "multistep": (["--multistep"], [43, 54]),
    "learning_rate": (["--learning-rate", "--lr"], 2.6e-3),
    "momentum": (["--momentum", "-m"], 0.9),
    "weight_decay": (["--weight-decay", "--wd"], 5e-4),
    "warmup": (["--warmup"], None),
    "num_workers": (["--num-workers"], 4),
    "fp16": (["--fp16"], False),
    "local_rank": (["--local_rank", "--local-rank"], 0),
    "data_pipeline": (["--data_pipeline", "--data-pipeline"], "dali"),
}
OURS = {
    "mode": (["--mode"], "training"),
    "orientation": (["--orientation"], "stored"),
    "backbone": (["--backbone"], "resnet50"),
    "backbone_weights": (["--backbone-weights"], "imagenet"),
    "freeze_backbone": (["--freeze-backbone"], False),
    "checkpoint": (["--checkpoint"], None),
    "resume": (["--resume"], None),
    "compile": (["--compile"], False),
    "output": (["--output"], Path("models")),
    "target": (["--target"], None),
    "score": (["--score"], None),
}


FLAGS = "-d x -e 2 -b 3 --ebs 4 -s 5 --lr 0.1 -m 0.2 --wd 0.3 --warmup 6 --num-workers 7"


def actions() -> dict[str, argparse.Action]:
    return {action.dest: action for action in make_parser()._actions if action.dest != "help"}


def test_names_aliases_and_defaults_are_the_frozen_ones():
    found = {name: (sorted(action.option_strings), action.default) for name, action in actions().items()}
    assert found == {name: (sorted(strings), default) for name, (strings, default) in (DOCUMENTED | OURS).items()}


def test_types():
    args = parse_args(FLAGS.split())
    assert vars(args) | {"data": Path("x"), "epochs": 2, "batch_size": 3, "eval_batch_size": 4, "seed": 5} == vars(args)
    assert (args.learning_rate, args.momentum, args.weight_decay) == (0.1, 0.2, 0.3)
    assert (args.warmup, args.num_workers) == (6, 7)


def test_every_flag_has_a_field_in_the_order_of_the_usage_text():
    assert [field.name for field in dataclasses.fields(Flags)] == list(actions())


def test_flags_are_read_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_args(["-d", "x"]).epochs = 3


def test_documented_flags_come_first_in_the_usage_text():
    listed = re.findall(r"^  (--[\w-]+|-h)", make_parser().format_help(), flags=re.MULTILINE)
    own = [strings[0] for strings, _ in OURS.values()]
    first_own = min(listed.index(name) for name in own)
    assert listed[1:first_own] == [strings[0] for strings, _ in DOCUMENTED.values()]


def readme_flags() -> dict[str, tuple[list[str], str]]:
    """Name -> (option strings, default) as README.rst's table of flags gives them."""
    rows = re.findall(r'^   "(``--[^"]*)", ([^,]*), ', README.read_text(), flags=re.MULTILINE)
    tables = {}
    for names, default in rows:
        strings = re.findall(r"``(--?[\w-]+)", names)
        tables[strings[0].lstrip("-").replace("-", "_")] = (strings, default.strip("`"))
    return tables


def test_readme_lists_every_flag_with_its_aliases_and_default():
    documented = readme_flags()
    documented.pop("help")
    flags = actions()
    assert documented.keys() == flags.keys()
    for name, (strings, default) in documented.items():
        assert sorted(strings) == sorted(flags[name].option_strings), name
        actual = flags[name].default
        if flags[name].required:
            expected = "required"
        elif isinstance(actual, list):
            expected = " ".join(map(str, actual))
        elif actual is None or actual is False:
            expected = "off" if name in ("fp16", "resume", "compile", "freeze_backbone") else "none"
        elif isinstance(actual, float):
            assert float(default) == actual
            continue
        else:
            expected = str(actual)
        assert default == expected, name


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("-e 65", [*EVALUATION_EPOCHS, 64]),
        ("-e 2", [*EVALUATION_EPOCHS, 1]),
        ("-e 5 --evaluation 1 2", [1, 2]),
        ("-e 5 --evaluation", []),
    ],
)
def test_evaluation_epochs(flags, expected):
    assert parse_args(["-d", "x", *flags.split()]).evaluation_epochs == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "--data"),
        ("-d x --epochs three", "'three' is not a whole number"),
        ("-d x --epochs 0", "--epochs 0"),
        ("-d x -b 0", "'0' is not a whole number from 1 to 2147483647"),
        ("-d x -b 1", "batch-norm"),
        ("-d x --lr nan", "'nan' is not a number"),
        ("-d x --lr -1", "--lr"),
        ("-d x --mode evaluation", "--checkpoint"),
        ("-d x --mode prediction", "--checkpoint"),
        ("-d x --mode export", "--checkpoint"),
        ("-d x --checkpoint a --resume b", "give one of them"),
        ("-d x --epoch 3", "unrecognized arguments"),
        ("-d x --data_pipeline tf", "invalid choice"),
    ],
)
def test_bad_flags_end_in_one_line_and_status_2(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(flags.split())
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("main.py: error: ")
    assert said in lines[0]


def test_a_restarted_job_may_name_the_weights_it_began_with():
    args = parse_args(["-d", "x", "--checkpoint", "a", "--resume"])
    assert (args.checkpoint, args.resume) == (Path("a"), True)


def test_home_folder_is_expanded():
    assert parse_args(["-d", "~/coco"]).data == Path.home() / "coco"
