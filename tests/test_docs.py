"""The pages build, their links lead somewhere, and what they name exists: modules, files, flags, commands."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from docutils import nodes
from docutils.core import publish_doctree

from src.data.recipes import RECIPES
from src.flags import make_parser, parse_args
from src.report.run_folder import RUN_FILES

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.rst"), *ROOT.glob("docs/*.rst"), *ROOT.glob("tests/**/README.rst")])
OTHER_PROGRAMS_FLAGS = (  # in prose: those of torchrun, Slurm, python -m benchmarks and python -m src.data.prepare
    "--nproc_per_node --master_addr --master_port --rdzv_endpoint --rdzv_id --max-restarts --local_addr "
    "--cpus-per-task --gpus-per-task --ntasks-per-node --kill-on-bad-exit --time --requeue --array --gpu "
    "--val --val-list --names"
)
MIN_ALT_WORDS = 15  # different ones; a title has five, a sentence that describes a picture has twenty

# Every page is read once; a warning of docutils raises.
page_params = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def read(page: Path) -> nodes.document:
    return publish_doctree(page.read_text(), str(page), settings_overrides={"halt_level": 2, "report_level": 5})


def literals(page: Path) -> list[str]:
    """What stands in ``double backquotes``, without line breaks."""
    return [" ".join(node.astext().split()) for node in read(page).findall(nodes.literal)]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each line of the literal blocks, as a shell reads them; lines that end in a backslash are joined."""
    for block in read(page).findall(nodes.literal_block):
        for line in block.astext().replace("\\\n", " ").splitlines():
            try:
                yield shlex.split(line, comments=True)
            except ValueError:  # no shell command: a quote is left open
                continue


def all_words(page: Path) -> list[str]:
    return [word for command in commands(page) for word in command] + [
        word for text in literals(page) for word in text.split()
    ]


@page_params
def test_page_builds_without_warnings(page):
    assert read(page).astext()


@page_params
def test_links_lead_to_files_and_sections(page):
    for link in read(page).findall(nodes.reference):
        target = link.get("refuri", "")
        if not target or re.match("https?:", target):
            continue
        path, _, section = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if section:
            assert section in read(file).ids, target


def alt_text_faults(text: str, name: str) -> list[str]:
    """What a picture's text lacks for those who do not see it."""
    words = {word.lower() for word in re.findall(r"[A-Za-z]{3,}", text)}
    faults = []
    if len(words) < MIN_ALT_WORDS:
        faults.append(f"{len(words)} different words: expected {MIN_ALT_WORDS} or more")
    if Path(name).name in text:
        faults.append("names the file")
    if re.match(r"(an? |the )?(image|picture|photo|plot|figure|screenshot)\b", text, re.IGNORECASE):
        faults.append("begins with the kind of file: begin with what it shows")
    if not text.endswith("."):
        faults.append("no sentence: expected a full stop at the end")
    return faults


@page_params
def test_pictures_exist_and_have_a_text(page):
    pictures = list(read(page).findall(nodes.image))
    for picture in pictures:
        assert (page.parent / picture["uri"]).is_file()
        assert alt_text_faults(picture.get("alt", ""), picture["uri"]) == []
    assert len({picture["alt"] for picture in pictures}) == len(pictures)


GOOD_ALT_TEXT = (
    "Curves over the demo: the loss falls to four; learning rate and mAP rise, and epochs run along the top axis."
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Curves of the demo, with its loss, rate and score.", "different words"),
        ("Curves of the demo. " * 10, "different words"),
        (f"In training.png: {GOOD_ALT_TEXT}", "names the file"),
        (f"Image of {GOOD_ALT_TEXT}", "kind of file"),
        (GOOD_ALT_TEXT.rstrip("."), "full stop"),
    ],
)
def test_a_poor_text_of_a_picture_is_found(text, fault):
    assert alt_text_faults(GOOD_ALT_TEXT, "docs/training.png") == []
    (found,) = alt_text_faults(text.strip(), "docs/training.png")
    assert fault in found


def test_the_curves_text_has_the_score_of_the_results():
    readme = ROOT / "README.rst"
    text = next(node["alt"] for node in read(readme).findall(nodes.image) if node["uri"].endswith("training.png"))
    (last_map,) = re.findall(r"and (0\.\d+) after epoch 9", text)
    assert re.search(rf"mAP .*{last_map} in float32", readme.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_a_page_begins_with_what_it_answers(page):
    first = next(iter(read(page).findall(nodes.paragraph))).astext()
    assert first.startswith("This page answers: ") and "?" in first


@page_params
def test_files_and_modules_that_a_page_names_exist(page):
    for text in literals(page):
        if re.match(r"(src|tests|docs|benchmarks)(/|$)|\w+\.(py|rst|toml)$|requirements.*\.txt$", text):
            assert (ROOT / text).exists(), text
    words = all_words(page)
    for place, word in enumerate(words[:-1]):
        if word == "-m" and re.match(r"(src|benchmarks)\b", words[place + 1]):
            module = ROOT / words[place + 1].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words[place + 1]


@page_params
def test_make_targets_that_a_page_names_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for command in [*commands(page), *map(str.split, literals(page))]:
        if command[:1] == ["make"] and len(command) > 1:
            assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE), command


@page_params
def test_commands_are_understood(page, capsys):
    for command in commands(page):
        if "main.py" in command and "..." not in command:
            arguments = command[command.index("main.py") + 1 :]
            if arguments and arguments[0].startswith("-"):
                parse_args(arguments)  # exits where it does not know a flag or a value


@page_params
def test_flags_in_prose_exist(page):
    known = {flag for action in make_parser()._actions for flag in action.option_strings} | set(
        OTHER_PROGRAMS_FLAGS.split()
    )
    named = {match for text in literals(page) for match in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert named <= known


def test_readme_links_every_page():
    linked = {link.get("refuri") for link in read(ROOT / "README.rst").findall(nodes.reference)}
    assert {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.rst")} <= linked


def test_output_page_names_every_file_of_a_run():
    assert set(RUN_FILES) <= set(literals(ROOT / "docs" / "output.rst"))


def test_readme_has_the_recipes_for_few_pictures():
    shown = [text for text in literals(ROOT / "README.rst") if text.startswith("--epochs ")]
    assert len(shown) == len(RECIPES)
    for text, recipe in zip(shown, RECIPES, strict=True):
        assert recipe.flags.startswith(text)
    for recipe in RECIPES:
        row = rf"\* - {recipe.pictures:,}\n.*\n +- {recipe.iterations(recipe.pictures):,}\n"
        assert re.search(row, (ROOT / "README.rst").read_text())
