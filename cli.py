"""The strict command line: presets and flags become a checked config before anything starts.

Order of precedence: flag > YAML preset > default. Everything is text until a field's annotation
coerces it, so YAML's reading of `3:1` as 181 and fire's reading of `false` as a true string cannot
happen. `python train_kd.py --help` lists every field. No torch import here.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import itertools
import math
import os
import sys
import time
import traceback
import typing
from pathlib import Path

import yaml

from config import ALIASES, REFUSED, STAGES, DistillConfig, Stopped, UserError
from layer_lists import auto_share

# What a disk says that is full, at its quota, read-only, not ours or failing.
STORAGE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
}  # fmt: skip
# Of a path that cannot be what it has to be.
PATHS = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}


class Bare(str):
    """The value that fire gives a flag without one."""


def _coerce(flag: str, text, annotation, meta):
    """Value of `text` under a field's annotation and allowed range, or UserError."""
    kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    raw = str(text).strip()
    if isinstance(text, Bare) and annotation is str and "true" not in (meta.get("choices") or ()):
        raise UserError(f"--{flag}: no value found, --{flag} VALUE expected")
    try:
        if annotation is bool:
            value = {"true": True, "1": True, "yes": True, "false": False, "0": False,
                     "no": False}[raw.lower()]  # fmt: skip
        elif annotation is int:
            digits = raw.replace("_", "")
            value = int(digits if digits.lstrip("+-").isdigit() else float(digits))
            if not digits.lstrip("+-").isdigit() and value != float(digits):
                raise ValueError
        elif annotation is float:
            value = float(raw)
            if not math.isfinite(value):
                raise ValueError
        else:
            value = raw
    except (KeyError, ValueError, OverflowError):
        kind = "true or false" if annotation is bool else kind
        raise UserError(f"--{flag}: '{raw}' found, {kind} expected") from None
    choices, low, high = meta.get("choices"), meta.get("low"), meta.get("high")
    if choices:
        value = value.lower()
        value = {"1": "true", "yes": "true", "0": "false", "no": "false"}.get(value, value)
        if value not in choices:
            raise UserError(f"--{flag}: '{raw}' found, one of {', '.join(choices)} expected")
    if low is not None and value < low:
        raise UserError(f"--{flag}: {raw} found, at least {low} expected")
    if high is not None and value > high:
        raise UserError(f"--{flag}: {raw} found, at most {high} expected")
    return value


def _slots(cls) -> dict[str, tuple]:
    """flag -> (group or None, field, annotation) for every setting of a config class."""
    hints = typing.get_type_hints(cls)
    slots = {}
    for f in dataclasses.fields(cls):
        group = f.metadata.get("group")
        if group is None:
            slots[f.name] = (None, f, hints[f.name])
            continue
        inner = typing.get_type_hints(hints[f.name])
        for g in dataclasses.fields(hints[f.name]):
            slots[f"{group}_{g.name}"] = (group, g, inner[g.name])
    return slots


def _set_all(cfg, values: dict, origin: str) -> set[str]:
    """Returns the flags that were set, by their names in `_slots`."""
    slots = _slots(type(cfg))
    for flag, text in values.items():
        flag = ALIASES.get(flag, flag)
        refused = REFUSED.get(type(cfg), {}).get(flag)
        if refused:
            raise UserError(f"{origin}{flag}: not taken here: {refused}")
        if flag not in slots:
            near = difflib.get_close_matches(flag, list(slots), 1)
            hint = f"; did you mean --{near[0]}?" if near else "; --help lists every flag"
            raise UserError(f"{origin}{flag}: unknown (value '{text}'){hint}")
        group, f, annotation = slots[flag]
        target = getattr(cfg, group) if group else cfg
        setattr(target, f.name, _coerce(flag, text, annotation, f.metadata))
    return {ALIASES.get(flag, flag) for flag in values}


def read_yaml(path: str | Path) -> dict[str, str]:
    """A preset as flat flag -> text. Settings of a group may be nested (`align: {lr: 1e-3}`)."""
    path, ours = Path(path), Path(__file__).parent
    if not path.is_file():
        if not (ours / path).is_file():  # the script may be run from anywhere
            have = ", ".join(sorted(f"configs/{p.name}" for p in ours.glob("configs/*.yaml")))
            raise UserError(f"--config: no file {path}; there are: {have or 'none'}")
        path = ours / path
    try:
        # BaseLoader keeps every scalar as text: no sexagesimal 3:1, no 1e-3 read as a string.
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=EachOnce) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"--config: {path} is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config: {path} holds a {type(tree).__name__}, settings expected")
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        inside = {f"{key}_{k}": v for k, v in value.items()} if nested else {key: value}
        for flag, found in inside.items():
            if flag in flat:
                raise UserError(f"{path}: {flag} found twice, once expected")
            items = found if isinstance(found, list) else [found]
            if not all(isinstance(item, str) for item in items):
                raise UserError(f"{path}: {flag}: '{found}' found, a value or a list expected")
            flat[flag] = ",".join(items)
    return flat


class EachOnce(yaml.BaseLoader):
    """Of a setting that is there twice YAML would silently take the last one."""

    def construct_mapping(self, node, deep=False):
        found = [self.construct_object(key, deep) for key, _ in node.value]
        twice = [key for i, key in enumerate(found) if key in found[:i]]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} found twice")
        return super().construct_mapping(node, deep)


def load_config(cls, flags: dict[str, str], preset: str | Path | None):
    """Defaults, then the YAML preset, then flags. Raises UserError on anything it cannot honour."""
    cfg = cls()
    level = {}  # of a setting: 1 where the preset has it, 2 where a flag
    if preset:
        level |= dict.fromkeys(_set_all(cfg, read_yaml(preset), f"{preset}: "), 1)
    level |= dict.fromkeys(_set_all(cfg, flags, "--"), 2)
    if cfg.wandb_enabled and cfg.tracker not in ("none", "wandb"):
        raise UserError(
            f"--wandb_enabled: found with --tracker {cfg.tracker}; one of them expected"
        )
    if cfg.plan_device and not cfg.plan:
        raise UserError(f"--plan_device: {cfg.plan_device} found, --plan expected too")
    if isinstance(cfg, DistillConfig):
        if cfg.keep_layers and level.get("layers", 0) >= level["keep_layers"]:
            raise UserError("--keep_layers: not together with --layers, it is the complement")
        for name in STAGES:
            stage = getattr(cfg, name)
            widely = {"context_len": "seq_len", "accumulation_steps": "micro_batch"}
            if name not in ("align", "block"):
                widely |= {"use_muon": "use_muon", "select_tokens": "select_tokens"}
            for broad, own in widely.items():  # a stage's own setting wins, but a flag over YAML
                value = getattr(cfg, broad)
                given = value or broad == "use_muon"  # of the others 0 is: not given
                if given and level.get(broad, 0) > level.get(f"{name}_{own}", 0):
                    setattr(stage, own, 0 if own == "micro_batch" else value)
            if name in ("align", "block") and stage.select_tokens < 1:
                raise UserError(
                    f"--{name}_select_tokens: {stage.select_tokens:g} found, 1 expected: {name} "
                    f"has a target for every token"
                )
        for name in cfg.stage_names():
            getattr(cfg, name).rows_per_step(name)
        odd = [n for n in ("step", "block", "resident") if level.get(f"cria_{n}")]
        if odd and not cfg.cria:
            raise UserError(f"--cria_{odd[0]}: found without --cria, the layers of a block")
        for flag in (flag for flag, how in level.items() if how == 2):  # presets may hold more
            group, _, name = flag.partition("_")
            if name == "muon_lr" and not getattr(cfg, group).use_muon:
                raise UserError(f"--{flag}: found without --{group}_use_muon")
            if group == "lora" and all(getattr(cfg, s).train != "lora" for s in cfg.stage_names()):
                raise UserError(f"--{flag}: found, but no stage of --stages trains lora")
            if group == "long" and "long" not in cfg.stage_names():
                raise UserError(f"--{flag}: found, but --stages {cfg.stages} has no long")
            if name == "tokens" and group in STAGES and level.get("epochs") == 2:
                raise UserError(f"--{flag}: found with --epochs, which says how long stages are")
            if group == "search" and auto_share(cfg.layers) is None:
                raise UserError(f"--{flag}: found with --layers {cfg.layers}, auto:SHARE expected")
    elif level.get("muon_lr") == 2 and not cfg.use_muon:
        raise UserError("--muon_lr: found without --use_muon")
    elif cfg.layers and cfg.keep_layers:
        raise UserError("--keep_layers: not together with --layers, it is the complement")
    elif cfg.reference and cfg.select_tokens == 1:
        raise UserError(f"--reference: {cfg.reference} found, --select_tokens below 1 expected too")
    elif cfg.select_tokens < 1 and not cfg.reference:
        raise UserError(
            f"--select_tokens: {cfg.select_tokens:g} found, --reference, a model to compare with, "
            f"expected too"
        )
    return cfg


def to_dict(cfg) -> dict:
    """The resolved config as plain YAML/JSON values."""
    return dataclasses.asdict(cfg)


def help_text(cls, doc: str) -> str:
    """Every flag with its default and one-line comment."""
    lines = [doc.strip(), "", "Flags (flag > YAML preset given by --config > default):", ""]
    slots = _slots(cls)
    for flag, (group, f, _) in slots.items():
        default = f.default if f.default is not dataclasses.MISSING else ""
        if group:
            default = getattr(getattr(cls(), group), f.name)
        text = f.metadata["help"]
        if f.metadata.get("choices"):
            text += f" [{'|'.join(f.metadata['choices'])}]"
        default = "" if default == "" else f" (default {default})"
        lines.append(f"  --{flag:<24} {text}{default}")
    return "\n".join(lines)


def parse_argv(argv: list[str]) -> tuple[str | None, dict[str, str]]:
    """(preset, flag -> text). Uses fire's grammar, but runs nothing until all is read."""
    import fire

    for word in argv:
        if word in ("-", "--"):
            raise UserError(f"'{word}' found between the flags, --name=value expected")
    collected: list = []

    def main(*args, config=None, **overrides):
        collected.append((args, config, overrides))

    fire.Fire(fire.decorators.SetParseFn(str)(main), command=list(argv), name="train")
    args, preset, overrides = collected[0]
    for word, after in itertools.pairwise([*argv, "--"]):
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and after.startswith("--") and overrides.get(name) == "True":
            overrides[name] = Bare("True")
    if len(args) > 1 or (args and preset):
        raise UserError(f"'{args[-1]}' found, one preset and --name=value flags expected")
    return (preset or (args[0] if args else None)), overrides


def run_main(cls, main, argv: list[str] | None = None, default_preset=None) -> None:
    """Parse the command line of a training script into a `cls` and call `main(cfg, command)`.

    `default_preset(flags)` names the preset when none is given. A UserError becomes one line on
    stderr (of one rank) and exit code 2, and so does a disk that is full or a path that cannot be;
    a run that is Stopped ends with its code; any other error with 1, after its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any(a in ("--help", "-h", "-help") for a in argv):
        print(help_text(cls, sys.modules[main.__module__].__doc__ or ""))
        return
    try:
        preset, flags = parse_argv(argv)
        if preset is None and default_preset is not None:
            preset = default_preset(flags)
            if os.environ.get("RANK", "0") == "0":
                print(f"preset: {preset} (no --config given)", flush=True)
        main(load_config(cls, flags, preset), argv)
    except UserError as e:
        _say(f"error: {e}")
        raise SystemExit(2) from None
    except Stopped as e:  # on all ranks; torchrun ends them all when the first one ends
        if os.environ.get("RANK", "0") == "0":
            print(e, file=sys.stderr, flush=True)
        else:
            time.sleep(1)
        raise SystemExit(e.code) from None
    except OSError as e:
        if e.errno not in STORAGE | PATHS:
            _fail(e)
        where = e.filename or "a file of the run"
        expected = "another path" if e.errno in PATHS else "room and permission to write"
        _say(f"error: {where}: {e.strerror}; {expected} expected")
        raise SystemExit(2) from None
    except Exception as e:
        _fail(e)


def _fail(error: Exception) -> typing.NoReturn:
    """The traceback; of one rank of several also a last line that names it, and out at once: the
    others wait for this one in a collective, which cannot be unwound on either side."""
    if "RANK" not in os.environ:
        raise
    traceback.print_exception(error)
    text = (str(error).splitlines() or [""])[0]
    line = f"error: rank {os.environ['RANK']}: {type(error).__name__}: {text}"
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _say(line: str) -> None:
    """One line for all ranks: what ends rank 0 ends the others, by torchrun, while they wait. Who
    is still there after that is the only one in trouble."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(5)
        line = f"rank {rank}: {line}"
    print(line, file=sys.stderr, flush=True)
