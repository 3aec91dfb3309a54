"""The docstring corpus, prepared once for each vocabulary."""

from data.prepare import prepare
from minidistil.errors import UserError
from minidistil.files import cache_folder
from minidistil.folder import one_at_a_time


def docstring_corpus(digest, vocab):
    """Returns the folder of the docstring corpus, tokenised with `vocab`, whose digest is `digest`.

    It is prepared if need be. Raises UserError where the cache cannot be written.
    """
    folder = cache_folder() / f"docstrings-{digest[:12]}"
    if not (folder / "meta.json").exists():
        try:
            with one_at_a_time(folder):
                if not (folder / "meta.json").exists():
                    prepare(["docstrings"], vocab, folder, val_share=0.02)
        except OSError as error:  # a checkout may be read-only
            way = "set MINIDISTIL_CACHE to a folder that you may write"
            raise UserError(f"the docstring corpus cannot be written to {folder} ({error.strerror}): {way}") from error
    return folder
