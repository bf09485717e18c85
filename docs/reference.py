"""Write the reference pages from the code: configuration keys, commands, fields of the receipt, the corpus, GPUs.

python docs/reference.py            writes docs/reference/{configuration,commands,receipt,corpus,gpus,gpu-checks}.md
python docs/reference.py --check    exits with 1 if the committed pages differ from the code
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from labtrain import conf
from labtrain.cli import help_page
from labtrain.cli import main as labtrain
from labtrain.environment.doctor import verdicts
from labtrain.environment.doctor.cliffs import CLIFFS
from labtrain.project.schema import keys_of
from labtrain.record import receipt

PAGES = Path(__file__).with_name("reference")
CONF = Path(conf.__file__).parent
SCHEMA = Path(receipt.__file__).with_name("receipt.schema.json")
CORPUS = Path(__file__).parents[1] / "tests/corpus/results.json"
CHECKS = Path(__file__).parents[1] / "tests/gpu/results.json"
MADE = "<!-- Written by docs/reference.py. Change the code, then run `make reference`. -->\n\n"
GROUPS = {
    "trainer": "The arguments of Lightning's Trainer; `null` is Lightning's default.",
    "determinism": "What the result may depend on.",
    "checkpoint": "Where checkpoints go, how often, and how many stay. See [Storage](../guides/storage.md).",
    "speed": "Speed and memory. See [Speed and memory](../guides/speed.md).",
}


def pages() -> dict[str, str]:
    """Return the text of each page, by file name."""
    return {
        "configuration.md": configuration(),
        "commands.md": commands(),
        "receipt.md": fields(),
        "corpus.md": corpus(),
        "gpus.md": gpus(),
        "gpu-checks.md": gpu_checks(),
    }


# ---------------------------------------------------------------------------------------------------- checks on GPUs


def gpu_checks() -> str:
    """Return the page of the checks on a GPU, from the results that the last recorded `make test-gpu` wrote."""
    found = json.loads(CHECKS.read_text())
    names = ", ".join(f"{card['name']} ({card['memory_gb']} GB)" for card in found["gpus"])
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value)
    where = f"Recorded on {names}." if names else (
        "**No GPU was available.** These are the results of a CPU, which stands in for the GPU where it can."
    )  # fmt: skip
    lines = [
        "# Checks on a GPU\n",
        "`make test-gpu` checks on one GPU what no CPU can show, and ends with this table and a JSON file. It takes",
        "less than eight minutes. A check that fails ends it with exit code 1.\n",
        f"{where} {versions}; {found['seconds']} seconds in all.\n",
        "| check | what it shows | result | seconds | figure, or the reason |",
        "| --- | --- | --- | --- | --- |",
    ]
    for each in found["checks"]:
        figure = _cell(" ".join(each["figure"].split()))
        lines.append(f"| `{each['name']}` | {_cell(each['shows'])} | {each['result']} | {each['seconds']} | {figure} |")
    lines += [
        "",
        "Two processes share one GPU in these checks alone. NCCL refuses two ranks on one GPU, and gloo sends no CUDA",
        "tensors point to point. So each process is a node of one device, and gloo sends copies in the host's memory:",
        "`tests/gpu/staged.py`. On a CPU the same code runs, with copies.\n",
        "## On a machine with its own torch and no network\n",
        "`make gpu-wheels` collects in `.wheels` what such a machine lacks (3 MB): Hydra, Cookiecutter, and labtrain.",
        "The machine needs Python 3.12 on x86-64 with torch, Lightning, torchmetrics and scikit-learn, of any release",
        "that `pyproject.toml` allows. Copy the repository there with `.wheels`, and run this with its Python:\n",
        "```bash",
        "python3 -m tests.gpu.wheels --install .wheels && python3 -m tests.gpu -o gpu.json",
        "```\n",
        "`python3 -m tests.gpu --only NAME` runs one check. `cp gpu.json tests/gpu/results.json && make reference`",
        "puts a report on this page.",
    ]
    return MADE + "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------- GPUs


def gpus() -> str:
    """Return the page of drivers and GPUs, from the data of `labtrain doctor`."""
    lines = [
        "# Drivers and GPUs\n",
        "`labtrain doctor` compares the driver and each GPU with the torch that is installed. These tables are its",
        "verdicts for the locks' builds. They were not tried on such machines: each follows from a source below.\n",
        "`runs`: this torch runs. `warns`: it runs, with a limit that the doctor names. `fails`: it does not run.",
        "Rows have the compute capability of a GPU, columns a driver and the newest CUDA that it is for. torch has",
        "compiled code (`sm_`) for some compute capabilities, which later ones of the same first number run, too.",
        "The driver compiles PTX code (`compute_`) at the first start. labtrain supports x86-64 only, so the Arm",
        "machine GB10 is here for its compute capability alone.\n",
    ]
    for route, build in verdicts.BUILDS.items():
        heads = [f"{driver} ({verdicts.shown(cuda)})" for driver, cuda in verdicts.DRIVERS]
        lines += [
            f"## {route}: CUDA {verdicts.shown(build.cuda)}\n",
            f"Code for {', '.join(build.architectures)}; cuDNN {verdicts.shown(build.cudnn or ())}.\n",
            f"| GPU | {' | '.join(heads)} |",
            f"| --- |{' --- |' * len(heads)}",
        ]
        reasons: dict[str, str] = {}
        for capability, name in verdicts.CARDS.items():
            found = [verdicts.of_gpu(driver, cuda, capability, build) for driver, cuda in verdicts.DRIVERS]
            lines.append(f"| {verdicts.shown(capability)} {name} | {' | '.join(each.result for each in found)} |")
            for each in found:
                if each.result != "runs":
                    reasons.setdefault(each.source, each.why)
        lines += ["", "Why, with an example for each source:\n"]
        lines += [*(f"- {why} ({source})" for source, why in reasons.items()), ""]
    lines += ["## What ends when\n", "| what | ends | then |", "| --- | --- | --- |"]
    lines += [f"| {each.what} | {f'{each.ends:%B %Y}' if each.ends else ''} | {each.then} |" for each in CLIFFS]
    lines += ["", "## Sources\n", *(f"- {key}: {text}" for key, text in verdicts.SOURCES.items())]
    return MADE + "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------- configuration


def configuration() -> str:
    """Return the page of the configuration's keys, from labtrain/conf and its comments."""
    lines = [
        "# Configuration\n",
        "Set a key with `python train.py KEY=VALUE`, or in the experiment's `conf/config.yaml`.",
        "`python train.py --help` lists the same keys with the values of your experiment.",
        "`???` marks a key without a default: your experiment must set it.\n",
        "## Top level\n",
        *_table(
            rows for rows in _keys(CONF / "labtrain.yaml") if rows[0].partition(".")[0] not in ("defaults", "hydra")
        ),
    ]
    for group, about in GROUPS.items():
        lines += [f"\n## {group}\n", f"{about}\n", *_table(_keys(CONF / group / "default.yaml", f"{group}."))]
    lines += ["\n## logger\n", "Choose one with `logger=NAME`.\n", "| option | keys and defaults |", "| --- | --- |"]
    for path in sorted((CONF / "logger").glob("*.yaml")):
        rows = list(_keys(path, "logger."))
        if path.stem == "many":
            told = ", ".join(f"`{name}`" for name in yaml.safe_load(path.read_text())["defaults"])
        else:
            told = "; ".join(f"`{key}={value}`" + (f" ({note})" if note else "") for key, value, note in rows)
        lines.append(f"| `logger={path.stem}` | {_cell(told or 'no logger')} |")
    return MADE + "\n".join(lines) + "\n"


def _keys(path: Path, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield key, default and meaning, as the page shows them."""
    for key, default, meaning in keys_of(path, prefix):
        yield key, "" if default is ... else _yaml(default), meaning


def _yaml(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _table(rows: Any) -> list[str]:
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, default, meaning in rows:
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{key}` | {_cell(shown)} | {_cell(meaning)} |")
    return lines


# ------------------------------------------------------------------------------------------------------ commands


def commands() -> str:
    """Return the page of the commands, from click."""
    lines = ["# Commands\n", "| command | effect |", "| --- | --- |"]
    leaves = list(_leaves(labtrain, "labtrain"))
    for name, command in leaves:
        anchor = re.sub(r"[^a-z0-9-]+", "-", name)
        lines.append(f"| [`{name}`](#{anchor}) | {_cell(_first(command))} |")
    lines += [
        "",
        "Exit codes: 0 yes or same, 1 no or different, 2 wrong usage or input, 75 stopped by a signal after saving.",
        "Data goes to standard output, everything else to standard error.",
    ]
    for name, command in leaves:
        context = click.Context(command, info_name=name)
        usage = " ".join([name, *command.collect_usage_pieces(context)])
        lines += [f"\n## {name}\n", f"```\n{usage}\n```\n", *_paragraphs(command)]
        assert isinstance(command, help_page.Command)
        lines += [f"Example: `{command.example}`", ""]
        rows = [row for parameter in command.params if (row := _option(parameter, context))]
        if rows:
            lines += ["| option | default | meaning |", "| --- | --- | --- |", *rows]
        while lines[-1] == "":
            lines.pop()
    return MADE + "\n".join(lines) + "\n"


def _leaves(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    for key, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _leaves(command, f"{name} {key}")
        else:
            yield f"{name} {key}", command


def _first(command: click.Command) -> str:
    return " ".join((command.help or "").partition("\n\n")[0].split())


def _paragraphs(command: click.Command) -> list[str]:
    """Return a command's help: prose as paragraphs, what click is told not to wrap as code."""
    lines: list[str] = []
    for paragraph in (command.help or "").split("\n\n"):
        verbatim = paragraph.lstrip("\n").startswith("\b")
        text = paragraph.replace("\b", "").strip("\n")
        lines += [f"```\n{text}\n```" if verbatim else " ".join(text.split()), ""]
    return lines


def _option(parameter: click.Parameter, context: click.Context) -> str:
    if not isinstance(parameter, click.Option) or parameter.hidden:
        return ""
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    kind = "" if parameter.is_flag else f" {_metavar(parameter, context)}"
    about = parameter.help or ""
    told = re.search(r"\s*\[default: (.*?)\]$", about)
    shown = parameter.show_default and parameter.default is not None
    default = told[1] if told else f"`{parameter.default}`" if shown else ""
    return f"| `{_cell(names + kind)}` | {_cell(default)} | {_cell(about[: told.start()] if told else about)} |"


def _metavar(option: click.Option, context: click.Context) -> str:
    return option.metavar or option.make_metavar(context)


# ------------------------------------------------------------------------------------------------------- receipt


def fields() -> str:
    """Return the page of the receipt's fields, from its JSON Schema."""
    schema = json.loads(SCHEMA.read_text())
    lines = [
        "# Receipt\n",
        f"{schema['description']} Its schema is `{schema['title']}`, `src/labtrain/record/{SCHEMA.name}`.\n",
        "`[]` stands for each item of a list, `NAME` for a key that depends on the run. A field that is not required",
        "can be missing. [Receipts](../guides/receipts.md) shows what you can do with it.\n",
        "| field | type | required | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for path, node, required in _walk(schema, schema, ""):
        need = "yes" if required else ""
        lines.append(f"| `{path}` | {_cell(_kind(node))} | {need} | {_cell(node.get('description', ''))} |")
    return MADE + "\n".join(lines) + "\n"


def _walk(schema: dict[str, Any], node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield path, schema and whether it is required of each field, depth first, in the schema's order."""
    for key, child in node.get("properties", {}).items():
        own = {**_resolve(schema, child), **{name: value for name, value in child.items() if name != "$ref"}}
        where = f"{path}.{key}".lstrip(".")
        yield where, own, key in node.get("required", [])
        yield from _walk(schema, own, where)
    items = node.get("items")
    if isinstance(items, dict) and "properties" in items:
        yield from _walk(schema, items, f"{path}[]")
    extra = node.get("additionalProperties")
    if isinstance(extra, dict) and "properties" in extra:
        yield from _walk(schema, extra, f"{path}.NAME")


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    found: Any = schema
    for part in node["$ref"].removeprefix("#/").split("/") if "$ref" in node else ():
        found = found[part]
    return found if "$ref" in node else node


def _kind(node: dict[str, Any]) -> str:
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    kinds = node.get("type", "any")
    words = [kinds] if isinstance(kinds, str) else list(kinds)
    if "^[0-9a-f]{64}$" in node.get("pattern", ""):
        words = ["sha256" if word == "string" else word for word in words]
    if isinstance(node.get("items"), dict) and isinstance(node["items"].get("type"), str):
        words = [f"array of {node['items']['type']}s" if word == "array" else word for word in words]
    return " or ".join(words)


# -------------------------------------------------------------------------------------------------------- corpus

VERDICTS = {
    "unchanged": "trained unchanged, and exactly",
    "one line": "trained exactly with one changed line",
    "refused": "refused, with a hint",
    "different": "other results after a resume, with a warning",
}


def corpus() -> str:
    """Return the page of the programs in tests/corpus, from the results of their tests."""
    results = json.loads(CORPUS.read_text())
    verdicts = [each["verdict"] for each in results.values()]
    lines = [
        "# Programs that were tried\n",
        f"labtrain was tried with {len(results)} small programs in the forms that Lightning's documentation and users'",
        "repositories have. Their code is in `tests/corpus`.\n",
        "| result | programs |",
        "| --- | --- |",
        *(f"| {about} | {verdicts.count(verdict)} |" for verdict, about in VERDICTS.items() if verdict in verdicts),
        "",
        "*Exactly* means that three trainings had the same outcome: weights, whole training state, metrics and every",
        "line of the trail. One was on one device. One was on two devices. One was on four devices, killed by SIGKILL,",
        "resumed on two, killed, resumed on one, killed, and resumed on four. All used the defaults: four shards, mode",
        "strict.\n",
        "The last column compares labtrain with plain Lightning. With `determinism.shards=1`, labtrain recorded each",
        "step's batch and random states. A plain `lightning.Trainer` then trained the same model on them. Its own",
        "loader had to yield as many batches of the same sizes. `same bits` means that every step's loss, every logged",
        "value and the final weights were equal. A number is the largest relative difference. The bound is 1e-6.\n",
        "| program | form | result | against plain Lightning |",
        "| --- | --- | --- | --- |",
    ]
    for program, found in results.items():
        about = found["verdict"] + (f": {_code(found)}" if found["says"] else "")
        plain = {found["losses"], found["weights"]} - {"", "same bits"}
        close = ", ".join(sorted(plain)) or ("same bits" if found["weights"] else "not compared")
        lines.append(f"| `{program}` | {_cell(found['form'])} | {_cell(about)} | {close} |")
    return MADE + "\n".join(lines) + "\n"


def _code(found: dict[str, Any]) -> str:
    return f"`{found['says']}`" if found["verdict"] == "one line" else str(found["says"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    stale = [
        name for name, text in pages().items() if not (PAGES / name).exists() or (PAGES / name).read_text() != text
    ]
    if "--check" in sys.argv[1:]:
        for name in stale:
            sys.stderr.write(f"error: docs/reference/{name} differs from the code\n\nhint: make reference\n")
        sys.exit(bool(stale))
    for name in stale:
        (PAGES / name).write_text(pages()[name])
        sys.stdout.write(f"docs/reference/{name}\n")
