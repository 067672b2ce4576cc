"""Files of a repository of the Hugging Face hub, by way of huggingface_hub and its cache on disk."""

import re
from pathlib import Path

from igpt_fast.errors import InputError
from igpt_fast.pretrained.files import CONFIG, Find

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


def is_hub_name(text: str) -> bool:
    """`owner/name`, and `@revision` behind it: what could be a repository, when it is no path that is there."""
    return bool(_NAME.fullmatch(text)) and "--" not in text and ".." not in text


def find_in_hub(name: str) -> Find:
    """What fetches one file of the repository `name` (with `@revision`: of that one) into the cache, or finds it there.

    HF_HUB_OFFLINE=1 and HF_HOME are honoured by huggingface_hub itself. Raises InputError when huggingface_hub is
    missing, or the repository is not to be had.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise InputError(
            f"there is no directory {name}, and to look for it on the Hugging Face hub, huggingface_hub 0.25 or later "
            "is needed; run: pip install igpt-fast[hf]"
        ) from error
    repository, _, revision = name.partition("@")

    def find(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except EntryNotFoundError as error:  # also: not in the cache, and no way to ask
            if file != CONFIG:
                return None
            failure: Exception = error
        except (OSError, ValueError) as error:  # no such repository, no right to it, no network
            failure = error
        reason = " ".join(str(failure).split())
        raise InputError(
            f"there is no directory {name}, and the Hugging Face hub gives no {file} of that name ({reason[:300]}); "
            "give a directory that is there, or a name while there is a network"
        ) from failure

    find(CONFIG)
    return find
