"""What ``--help`` promises of every command: its examples, its flags, and errors that lead on."""

import argparse
import json
import re

import pytest

from diffcal.cli import _parser, main


def commands(parser=None, words=()):
    """Every command's words and its parser."""
    parser = parser or _parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from commands(sub, (*words, name))
            return
    yield words, parser


def configured():
    """Commands with ``--set`` that need no earlier run to tell their settings."""
    for words, parser in commands():
        flags = {flag for action in parser._actions for flag in action.option_strings}
        if "--set" in flags and "--index" not in flags:
            yield pytest.param(words, parser, id=" ".join(words))


def dry_run(words, parser, *more):
    needed = []
    for action in parser._actions:
        if action.required and action.option_strings:
            needed += [action.option_strings[-1], "x"]
        elif action.required:
            needed.append("x")
    return main([*words, *needed, "--dry-run", *more])


def the(parser, flag):
    return next(action for action in parser._actions if flag in action.option_strings)


@pytest.mark.parametrize(("words", "parser"), [*configured()])
def test_the_example_of_set_is_a_setting(words, parser, capsys):
    examples = re.findall(r"[a-z_.]+=\S+", the(parser, "--set").help)
    assert examples
    for example in examples:
        assert dry_run(words, parser, "--set", example) == 0
        found = json.loads(capsys.readouterr().out)
        key, value = example.split("=")
        if words == ("calibrate",) and "." in key:
            key = f"settings.{key}"
        for part in key.split("."):
            found = found[part]
        assert str(found).lower() == value


@pytest.mark.parametrize(("words", "parser"), [*configured()])
def test_seed_is_short_for_what_it_says(words, parser, capsys):
    flags = {flag for action in parser._actions for flag in action.option_strings}
    if "--seed" not in flags:
        assert words in {("csm", "annotate"), ("csm", "publish"), ("calibrate",)}
        return
    assert dry_run(words, parser, "--seed", "31") == 0
    made = json.loads(capsys.readouterr().out)
    keys = re.findall(r"([a-z_.]+)=N", the(parser, "--seed").help)
    assert keys
    for key in keys:
        found = made
        for part in key.split("."):
            found = found[part]
        assert found == 31


def test_a_setting_of_a_section_is_pointed_out(capsys):
    for override, meant in (
        ("plan.groups=1", "'generate.plan'"),
        ("groups=1", "'generate.plan.groups'"),
        ("grops=1", "'generate.plan.groups'"),
        ("generate.steps=1", "'generate.generation.sampler.steps'"),
    ):
        assert main(["csm", "run", "--out", "x", "--dry-run", "--set", override]) == 2
        assert f"did you mean {meant}?" in capsys.readouterr().err


def test_settings_of_a_fresh_installation_do_not_depend_on_the_folder(tmp_path, monkeypatch):
    from diffcal import load_denoiser
    from diffcal.workflows.generate import ModelConfig

    monkeypatch.chdir(tmp_path)
    assert load_denoiser(ModelConfig().source).class_names == tuple("0123456789")
