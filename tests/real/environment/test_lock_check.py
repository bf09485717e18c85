"""`labtrain lock check`: every disagreement is found and named. Each case changes real locks, in a copy."""

import json
import random
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement

from labtrain.cli import main
from labtrain.environment.lock import read_lock
from labtrain.environment.lock.check import check_locks
from labtrain.environment.lock.conda import CPU, DEFAULT, Profile, content_hash
from labtrain.environment.lock.derive import choose_file, conda_requirements, hex_digest, sri, wheel_entry
from labtrain.environment.lock.pins import PYTHON_312_LINUX
from labtrain.environment.lock.pixi import full_records, lock_text, manifest
from tests.conftest import LABTRAIN, ROOT
from tests.support.locks import FILES, change

pytest_plugins = ["tests.support.locks"]


def other_digit(character: str) -> str:
    return "0" if character != "0" else "1"


def one_character(text: str, at: int) -> str:
    return text[:at] + other_digit(text[at]) + text[at + 1 :]


def test_the_locks_of_the_repository_agree() -> None:
    done = subprocess.run([LABTRAIN, "lock", "check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    routes = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert routes["wheels"] == routes["nix"]
    assert re.fullmatch(
        r"torch 2\.9\.1, CUDA runtime 12\.8\.\d+, cuDNN 9\.10\.[\d.]+, NCCL 2\.27\.\d+", routes["wheels"]
    )
    assert re.fullmatch(
        r"torch 2\.9\.1, CUDA runtime 12\.9\.\d+, cuDNN 9\.10\.[\d.]+, NCCL 2\.\d+[\d.]+", routes["conda"]
    )
    assert routes["conda-cpu"] == "torch 2.9.1"


def test_all_of_a_locks_disagreements_come_at_once(locks: Path) -> None:
    change(locks / "environment.yml", "hydra-core=1.3.*", "hydra-core=1.2.*")
    change(locks / "nix/wheels.json", '"name": "click"', '"name": "clack"')
    done = subprocess.run([LABTRAIN, "lock", "check", "--json"], cwd=locks, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    found = {(entry["file"], entry["what"]) for entry in json.loads(done.stdout)}
    assert {
        ("environment.yml", "hydra-core"),
        ("conda-lock.yml", "content of environment.yml and virtual-packages.yml"),
        ("nix/wheels.json", "click"),
        ("nix/wheels.json", "clack"),
    } <= found
    assert done.stderr.startswith("hint: git checkout ")
    assert done.stderr.endswith("after a change of pyproject.toml or environment.yml: labtrain lock write\n")


def test_a_broken_lock_is_a_row_of_the_table(locks: Path) -> None:
    (locks / "conda-lock.yml").write_text("{")
    done = subprocess.run([LABTRAIN, "lock", "check"], cwd=locks, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[0].split() == ["file", "what", "found", "expected"]
    assert done.stdout.splitlines()[1].startswith("conda-lock.yml  the file  not a conda lock")


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:200] + b"\xff" + content[201:])


SIX = "#\n  six==1.16.0 --hash=sha256:8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254\n"


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        *[(name, damage, "is not UTF-8") for name in FILES],
        ("requirements.lock", lambda path: change(path, "; sys_platform", "; sys_platfxrm"), "sys_platfxrm == "),
        ("requirements.lock", lambda path: change(path, "absl-py==2.5.1 ", "absl-py==2.5.1..x "), "absl-py==2.5.1..x"),
        ("requirements.lock", lambda path: path.write_text(path.read_text() + SIX), "six is pinned as 1.17.0 and as 1.16.0"),
        ("pyproject.toml", lambda path: change(path, '"numpy>=', '"numpy >>>='), "'numpy >>>=1.26': Expected"),
        ("pyproject.toml", lambda path: path.write_text(""), "must have a table [project]"),
        ("pyproject.toml", lambda path: change(path, "dependencies = [", "dependencies = [1, "), "dependencies: "),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_a_row_and_no_traceback(
    name: str, edit: Callable[[Path], None], says: str, locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte that is not UTF-8 in any file; one wrong character in a marker, a version, a requirement."""
    monkeypatch.chdir(locks)
    edit(locks / name)
    done = CliRunner().invoke(main, ["lock", "check", "--json"])
    assert done.exit_code == 1, done.exception
    (row,) = [row for row in json.loads(done.stdout) if row["file"] == name and row["what"] == "the file"]
    if edit is not damage or name in ("requirements.lock", "requirements-conda.lock", "flake.lock", "pyproject.toml"):
        assert says in row["found"]
    assert f"git checkout {name}" in done.stderr


OWNERS = {  # what begins an entry, with its name
    "requirements.lock": r"^([a-z0-9][\w.-]*)==",
    "requirements-conda.lock": r"^([a-z0-9][\w.-]*)==",
    "pixi.lock": r"^- conda: \S+/(\S+)-[^-\s]+-[^-\s]+$",
}


def hashes_of(name: str, pattern: str) -> list[tuple[int, str]]:
    """(position of a digit, package) for a seeded choice of a lock's hashes."""
    text = (ROOT / name).read_text()
    owner = re.compile(OWNERS.get(name, r"^- name: (\S+)"), re.MULTILINE)
    places = [match.start(1) for match in re.finditer(pattern, text)]
    chosen = random.Random(1).sample(places, 8)
    return [
        (place + 5, [match.group(1) for match in owner.finditer(text) if match.start() < place][-1]) for place in chosen
    ]


HASHES = [
    *[("requirements.lock", *case) for case in hashes_of("requirements.lock", r"sha256:([0-9a-f]{64})")],
    *[("requirements-conda.lock", *case) for case in hashes_of("requirements-conda.lock", r"sha256:([0-9a-f]{64})")],
    *[("conda-lock.yml", *case) for case in hashes_of("conda-lock.yml", r"sha256: ([0-9a-f]{64})")],
    *[("conda-lock.yml", *case) for case in hashes_of("conda-lock.yml", r"md5: ([0-9a-f]{32})")],
    *[("conda-lock-cpu.yml", *case) for case in hashes_of("conda-lock-cpu.yml", r"sha256: ([0-9a-f]{64})")[:4]],
    *[("conda-lock-cpu.yml", *case) for case in hashes_of("conda-lock-cpu.yml", r"md5: ([0-9a-f]{32})")[:4]],
    *[("pixi.lock", *case) for case in hashes_of("pixi.lock", r"sha256: ([0-9a-f]{64})")[:4]],
    *[("pixi.lock", *case) for case in hashes_of("pixi.lock", r"md5: ([0-9a-f]{32})")[:4]],
]


@pytest.mark.parametrize(("name", "at", "package"), HASHES)
def test_one_character_of_a_hash_is_named(name: str, at: int, package: str, locks: Path) -> None:
    (locks / name).write_text(one_character((locks / name).read_text(), at))
    found = [(entry.file, entry.what) for entry in check_locks(locks)]
    assert any(
        file == name and re.split(r"[ ]", what)[0].replace("_", "-") == package.replace("_", "-")
        for file, what in found
    ), found


@pytest.mark.parametrize("index", [0, 40, 100, 200, 253])
def test_one_character_of_a_wheels_hash_is_named(index: int, locks: Path) -> None:
    entries = json.loads((locks / "nix/wheels.json").read_text())
    digest = hex_digest(entries[index]["hash"])
    entries[index]["hash"] = sri(one_character(digest, 7))
    (locks / "nix/wheels.json").write_text(json.dumps(entries))
    assert ("nix/wheels.json", entries[index]["name"]) in [(entry.file, entry.what) for entry in check_locks(locks)]


def edit_conda(locks: Path, edit: Callable[[dict], None]) -> None:
    lock = yaml.safe_load((locks / "conda-lock.yml").read_text())
    edit(next(entry for entry in lock["package"] if entry["name"] == "lightning"))
    (locks / "conda-lock.yml").write_text(yaml.safe_dump(lock, sort_keys=False))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda entry: entry.pop("url"), "url None"),
        (lambda entry: entry.update(url=entry["url"].replace("lightning-2", "lightning-3")), "url https"),
        (lambda entry: entry["hash"].pop("sha256"), "sha256 missing"),
        (lambda entry: entry["hash"].update(md5="1234"), "md5 1234"),
        (lambda entry: entry["dependencies"].update(pytorch=">=3"), "pytorch 2.9.1"),
        (lambda entry: entry["dependencies"].update(nothing=">=1"), "missing dependency nothing >=1"),
        (lambda entry: entry.update(version="2.6.9"), "url https"),
    ],
)
def test_an_entry_of_the_conda_lock_that_is_not_whole_is_named(
    edit: Callable[[dict], None], says: str, locks: Path
) -> None:
    edit_conda(locks, edit)
    found = [entry for entry in check_locks(locks) if (entry.file, entry.what) == ("conda-lock.yml", "lightning")]
    assert any(entry.found.startswith(says) for entry in found), found


@pytest.mark.parametrize(
    ("name", "before", "after", "file", "what"),
    [
        ("pyproject.toml", '"torch==2.9.1"', '"torch==2.9.2"', "requirements.lock", "torch"),
        ("pyproject.toml", '"lightning>=2.6,<2.7"', '"lightning>=2.7,<2.8"', "requirements.lock", "lightning"),
        ("pyproject.toml", '"click>=8.1"', '"clack>=8.1"', "requirements.lock", "clack"),
        ("environment.yml", "pytorch-gpu=2.9.1", "pytorch-gpu=2.9.2", "environment.yml", "pytorch-gpu"),
        ("environment.yml", "omegaconf=2.3.*", "omegaconf=2.4.*", "environment.yml", "omegaconf"),
        (
            "environment.yml",
            "  - tqdm\n",
            "",
            "conda-lock.yml",
            "content of environment.yml and virtual-packages.yml",
        ),
        (
            "virtual-packages.yml",
            '"12.1"',
            '"12.2"',
            "conda-lock.yml",
            "content of environment.yml and virtual-packages.yml",
        ),
        (
            "conda-lock.yml",
            "56d2250f",
            "56d2250e",
            "conda-lock.yml",
            "(metadata)",
        ),
        ("environment-cpu.yml", "cpu_mkl", "cpu_mkk", "environment-cpu.yml", "pytorch"),
        ("environment-cpu.yml", "- rich\n", "", "environment-cpu.yml", "rich"),
        ("environment-cpu.yml", "# environment.yml for", "# environment.yml of", "environment-cpu.yml", "environment"),
        ("environment.yml", "  - tqdm\n", "", "environment-cpu.yml", "tqdm"),
        ("environment.yml", "  - tqdm\n", "", "pixi.toml", "tqdm"),
        ("conda-lock-cpu.yml", "- url: conda-forge", "- url: conda-forgf", "conda-lock-cpu.yml", "(metadata)"),
        ("conda-lock.yml", "- environment.yml", "- environment.yaml", "conda-lock.yml", "(metadata)"),
        ("conda-lock-cpu.yml", "click-8.4.2", "click-8.4.3", "conda-lock-cpu.yml", "click"),
        ("conda-lock-cpu.yml", "category: main", "category: mail", "conda-lock-cpu.yml", "_openmp_mutex"),
        ("conda-lock-cpu.yml", "libtorch: 2.9.1", "libtorch: 2.9.2", "conda-lock-cpu.yml", "pytorch"),
        ("pixi.toml", 'cuda = "12"', 'cuda = "13"', "pixi.toml", "platforms"),
        ("pixi.toml", "--require-hashes ", "", "pixi.toml", "cmd"),
        ("pixi.toml", 'hydra-core = "1.3.*"', 'hydra-core = "1.4.*"', "pixi.toml", "hydra-core"),
        ("pixi.lock", "version: 7", "version: 6", "pixi.lock", "(metadata)"),
        ("pixi.lock", "__cuda=12", "__cuda=11", "pixi.lock", "(metadata)"),
        ("pixi.lock", "conda-forge/\n", "conda-forgf/\n", "pixi.lock", "(metadata)"),
        (
            "pixi.lock",
            "- llvm-openmp >=9.0.1",
            "- llvm-openmp >=9.0.2",
            "pixi.lock",
            "_openmp_mutex-4.5-7_kmp_llvm.conda",
        ),
        ("pixi.lock", "size: 8244", "size: 8245", "pixi.lock", "_openmp_mutex-4.5-7_kmp_llvm.conda"),
        ("requirements.lock", "\nclick==8.5.1 ", "\nclick==8.5.2 ", "requirements.lock", "click 8.5.2"),
        ("requirements-conda.lock", "ruff==0.", "ruff==1.", "requirements-conda.lock", "ruff"),
        (
            "requirements.lock",
            "\ntorch==",
            "\n--index-url https://example.org/simple\ntorch==",
            "requirements.lock",
            "an address",
        ),
        ("flake.lock", "3aadb7ca", "3aadb7cb", "flake.lock", "nixpkgs"),
        ("nix/wheels.json", '"dist": "cp312"', '"dist": "cp311"', "nix/wheels.json", None),
    ],
)
def test_one_change_of_a_pin_is_named(
    name: str, before: str, after: str, file: str, what: str | None, locks: Path
) -> None:
    change(locks / name, before, after)
    found = [(entry.file, entry.what) for entry in check_locks(locks)]
    sealed = name in (
        "conda-lock.yml",
        "conda-lock-cpu.yml",
        "pixi.lock",
        "requirements.lock",
        "nix/wheels.json",
        "flake.lock",
    )
    assert not sealed or found[0][0] == name, "the damaged file comes first"
    assert any(entry == (file, what) or (what is None and entry[0] == file) for entry in found), found


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("pyproject.toml", "flake.lock")])
@pytest.mark.parametrize("how", ["removed", "emptied", "broken"])
def test_a_file_that_cannot_be_read_is_named(name: str, how: str, locks: Path) -> None:
    if how == "removed":
        (locks / name).unlink()
    else:
        (locks / name).write_text("" if how == "emptied" else "{[not a lock")
    assert any(
        entry.file in (name, name.replace("virtual-packages", "environment"), "conda-lock.yml")
        for entry in check_locks(locks)
    )


def test_what_conda_lacks_is_what_is_installed_on_top() -> None:
    """cookiecutter is not in the conda lock; torch and CUDA's libraries are, under other names."""
    names = set(re.findall(r"^([a-z0-9-]+)==", conda_requirements(ROOT), re.MULTILINE))
    assert {"cookiecutter", "conda-lock"} <= names
    assert not names & {"torch", "numpy", "lightning", "matplotlib", "xxhash", "nvidia-cudnn-cu12"}


@pytest.mark.parametrize(("profile", "count"), [(DEFAULT, 320), (CPU, 289)])
def test_conda_lock_itself_agrees(profile: Profile, count: int) -> None:
    """Its own parser reads the lock, its renderer lists each package, its hash is the one in the lock."""
    from conda_lock.conda_lock import parse_conda_lock_file

    content = parse_conda_lock_file(ROOT / profile.lock)
    assert len(content.package) == count
    assert content.metadata.content_hash["linux-64"] == content_hash(ROOT, profile)


@pytest.mark.parametrize(("profile", "count"), [(DEFAULT, 320), (CPU, 289)])
def test_conda_lock_renders_the_lock(profile: Profile, count: int, tmp_path: Path) -> None:
    command = [
        str(Path(LABTRAIN).with_name("conda-lock")),
        "render",
        "--kind",
        "explicit",
        "-p",
        "linux-64",
        str(ROOT / profile.lock),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "conda-linux-64.lock").read_text().splitlines()
    assert len([line for line in lines if line.startswith("https://")]) == count


def test_any_character_of_the_sbom_is_named(locks: Path) -> None:
    """Its seals by the locks, and the rest by its serial number, a digest of its content."""
    text, draw = (locks / "sbom.cdx.json").read_text(), random.Random(1)
    for _ in range(3):
        at = draw.choice([match.start() for match in re.finditer(r"[0-9a-z](?=[^\n]*\n)", text)])
        (locks / "sbom.cdx.json").write_text(one_character(text, at))
        assert [entry for entry in check_locks(locks) if entry.file == "sbom.cdx.json"], at


def packages_of(text: str) -> list[str]:
    return re.findall(r"^- conda: (\S+)\n  ", text, re.MULTILINE)


def test_a_package_of_pixis_lock_is_named(locks: Path) -> None:
    """One that is missing, one that no conda lock has, and one in the wrong environment."""
    text = (locks / "pixi.lock").read_text()
    (click,) = [url for url in packages_of(text) if "/click-" in url]
    lock = yaml.safe_load(text)
    lock["packages"] = [entry for entry in lock["packages"] if entry["conda"] != click]
    lock["packages"].append({"conda": click.replace("/click-", "/clack-"), "md5": "0" * 32})
    lock["environments"]["cpu"]["packages"]["linux-64"].remove({"conda": click})
    (cudnn,) = [url for url in packages_of(text) if "/cudnn-" in url]
    lock["environments"]["cpu"]["packages"]["linux-64"].append({"conda": cudnn})
    (locks / "pixi.lock").write_text(yaml.safe_dump(lock))
    found = {(entry.what, entry.found) for entry in check_locks(locks) if entry.file == "pixi.lock"}
    assert {("click", "missing in packages"), ("click", "missing in cpu"), ("cudnn", cudnn),
            ("clack", click.replace("/click-", "/clack-"))} <= found  # fmt: skip


def test_a_build_that_only_the_cpu_lock_has_is_named(locks: Path) -> None:
    """Apart from PyTorch's: those must have the same version."""
    change(locks / "conda-lock-cpu.yml", "/click-8.4.2-pyh", "/click-8.4.2-pyg")
    change(locks / "conda-lock-cpu.yml", "- name: pytorch\n  version: 2.9.1", "- name: pytorch\n  version: 2.9.0")
    found = {(entry.what, entry.wanted) for entry in check_locks(locks) if entry.file == "conda-lock-cpu.yml"}
    assert ("pytorch", "2.9.1 (conda-lock.yml)") in found
    assert any(what == "click" and "/click-8.4.2-pyh" in wanted for what, wanted in found)


@pytest.mark.parametrize("name", ["environment-cpu.yml", "conda-lock-cpu.yml", "pixi.toml", "pixi.lock"])
def test_any_character_is_named(name: str, locks: Path) -> None:
    """A seeded choice of places: another character there, one more, or one less. Equal YAML is no change."""
    text, draw = (locks / name).read_text(), random.Random(name)
    for _ in range(3):
        at, character = draw.randrange(len(text)), draw.choice("aZ07-:=<>{}[]'\"#&*!,. \n")
        changed = text[:at] + draw.choice([character, character + text[at], ""]) + text[at + 1 :]
        (locks / name).write_text(changed)
        found = [entry.what for entry in check_locks(locks) if entry.file == name]
        if not found:
            assert name.endswith((".yml", ".lock")), (at, character)
            assert yaml.safe_load(changed) == yaml.safe_load(text), (at, character)


def test_rattler_reads_pixis_lock_and_its_packages_fit() -> None:
    """With pixi's own library: both environments, and every package's dependencies and constraints."""
    from rattler import BuildString, LockFile, PackageRecord

    lock = LockFile.from_path(ROOT / "pixi.lock")
    for name, count, virtual in (("default", 320, {"__cuda": "12"}), ("cpu", 289, {})):
        environment = lock.environment(name)
        (platform,) = environment.platforms()
        records = environment.conda_repodata_records_for_platform(platform)
        assert len(records) == count
        versions = {"__glibc": "2.28", "__unix": "0", "__linux": "4.18"} | virtual
        machine = [
            PackageRecord(name=package, version=version, build=BuildString("0"), build_number=0, subdir="linux-64")
            for package, version in versions.items()
        ]
        PackageRecord.validate([*records, *machine])


def test_pixis_lock_is_what_rattler_writes(locks: Path) -> None:
    """From its own records: so `lock write` of unchanged locks changes nothing."""
    assert lock_text(locks, full_records(locks, set())) == (ROOT / "pixi.lock").read_text()
    assert manifest(locks) == (ROOT / "pixi.toml").read_text()


def test_wheels_are_chosen_by_their_tags() -> None:
    pin = read_lock(ROOT / "requirements.lock", PYTHON_312_LINUX)["numpy"]
    digests = list(pin.hashes[:6])
    files = [
        ("numpy-2.5.5-cp311-cp311-manylinux_2_28_x86_64.whl", digests[0]),
        ("numpy-2.5.5-cp312-cp312-manylinux_2_28_x86_64.whl", digests[1]),
        ("numpy-2.5.5-cp312-cp312-musllinux_1_2_x86_64.whl", digests[2]),
        ("numpy-2.5.5-cp312-cp312-manylinux_2_39_x86_64.whl", digests[3]),
        ("numpy-2.5.5.tar.gz", digests[4]),
    ]
    assert choose_file(pin, files)[1] == digests[1]
    assert choose_file(pin, files[4:])[1] == digests[4]
    entry = wheel_entry(pin, "x_y-1.0-2-cp312-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", digests[0])
    assert (entry["pname"], entry["version"], entry["build"], entry["abi"]) == ("x_y", "1.0", "2", "abi3")
    assert entry["platform"] == "manylinux_2_17_x86_64.manylinux2014_x86_64"
    assert hex_digest(entry["hash"]) == digests[0]


def test_the_sbom_is_valid_cyclonedx() -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (ROOT / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    purls = {component.get("purl") for component in json.loads(text)["components"]}
    assert {"pkg:pypi/torch@2.9.1", "pkg:conda/pytorch@2.9.1?channel=conda-forge"} <= purls


def test_conda_satisfies_each_pin_that_is_installed_beside_it(locks: Path) -> None:
    """Of environment.yml, of pyproject.toml, and what the packages of requirements-conda.lock say that they need."""
    assert check_locks(locks) == []
    needy = next(pin for pin in read_lock(locks / "requirements-conda.lock", PYTHON_312_LINUX).values()
                 if pin.name == "googleapis-common-protos")  # fmt: skip
    installed = metadata.distribution("googleapis-common-protos")
    assert installed.version == needy.version
    path = locks / "conda-lock.yml"
    before = path.read_text()

    def found(package: str, version: str, other: str) -> set[tuple[str, str]]:
        """Return what is said of a package once the lock has another version of it, and a sha256 that fits nothing."""
        (entry,) = re.findall(rf"^- name: {package}\n(?:  .*\n)*", before, re.MULTILINE)
        assert version in entry
        path.write_text(before.replace(entry, entry.replace(version, other)))
        return {(each.what, each.wanted) for each in check_locks(locks) if each.found == other}

    protobuf = next(line for line in installed.requires or () if line.startswith("protobuf"))
    assert (
        "protobuf",
        f"{Requirement(protobuf)} (googleapis-common-protos {needy.version} in requirements-conda.lock)",
    ) in found("protobuf", "6.31.1", "8.99.0")
    assert ("lightning", "lightning=2.6.* (environment.yml)") in found("lightning", "2.6.0", "2.5.0")
    assert ("lightning", "lightning<2.7,>=2.6 (pyproject.toml)") in found("lightning", "2.6.0", "2.5.0")
    path.write_text(before)


def test_an_experiments_own_wheel_is_compared_with_its_lock(tmp_path: Path) -> None:
    root = tmp_path / "experiment"
    subprocess.run([LABTRAIN, "new", str(root)], capture_output=True, check=True)
    assert check_locks(root) == []
    text = (root / "labtrain.lock").read_text()
    at = text.index("sha256:") + 7
    (root / "labtrain.lock").write_text(one_character(text, at))
    (found,) = check_locks(root)
    assert (found.file, found.what.startswith("vendor/labtrain-")) == ("labtrain.lock", True)
