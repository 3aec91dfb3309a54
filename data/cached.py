"""The docs corpus, prepared once for each vocabulary."""

from data.prepare import prepare
from minidistil.errors import UserError
from minidistil.files import cache_folder
from minidistil.folder import one_at_a_time


def docs_corpus(digest, vocab):
    """Returns the folder of the docs corpus, tokenised with `vocab`, whose digest is `digest`; prepares it if need be.

    Raises UserError where the cache cannot be written.
    """
    folder = cache_folder() / f"docs-{digest[:12]}"
    if not (folder / "meta.json").exists():
        try:
            with one_at_a_time(folder):
                if not (folder / "meta.json").exists():
                    prepare(["docs"], vocab, folder, val_share=0.02)
        except OSError as error:  # a checkout may be read-only
            way = "set MINIDISTIL_CACHE to a folder that you may write"
            raise UserError(f"the docs corpus cannot be written to {folder} ({error.strerror}): {way}") from error
    return folder
