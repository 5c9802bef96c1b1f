"""Models by the name that they have on Hugging Face's hub."""

from pathlib import Path

FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
"""What is downloaded: data, never code or pickles."""


def local_folder(name: str) -> Path:
    """A path as it is; a hub id ("owner/name") that is no folder here is downloaded to Hugging Face's cache.

    Raises:
        FileNotFoundError: neither is there.
    """
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as e:  # the hub's errors have no common class, and all mean this
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise FileNotFoundError(f"{name}: no such folder here, and not loaded from the hub: {reason}") from e
