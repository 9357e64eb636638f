"""Where images and captions come from: the data set that a `Spec` describes, opened.

A source has N rows and these members:

  place         what messages call it
  names         [N] StringDType, what messages call each row
  texts         [M] StringDType, all captions
  text_start    [N + 1] int64: row i has the captions from text_start[i] to text_start[i + 1]
  notes         sentences for the user
  left_out      (name, reason) of what was found and is not a row
  window        None; or how many rows back can be read: then rows are best read in nearly rising order
  read(row)     the encoded bytes of an image. Raises OSError. From any thread, also after a fork
  stamp(row)    (identity, size, mtime_ns, ctime_ns): changes whenever the bytes may have changed. Raises OSError
  stamps(), identities()    of folders and tars: the stamps of all rows at once, without looking at each again
"""

from pathlib import Path

from library.data.sources.downloads import Addresses
from library.data.sources.folder import Folder, Masks, open_masks
from library.data.sources.hosted import DataSet, Streamed
from library.data.sources.shards import Shards
from library.data.specs import Spec
from library.errors import UserError

__all__ = ["Masks", "open_masks", "open_source"]
Source = Folder | Shards | DataSet | Streamed | Addresses


def open_source(spec: Spec, index_dir: Path, skip_bad: bool) -> Source:
    """Open the data set of `spec`.

    index_dir: where the indexes of tars and what is downloaded are kept; made when it is needed.
    skip_bad: leave out, and note, what cannot be used. Raises `UserError` naming it otherwise, and for what is not there.
    """
    origin = spec.origin
    if origin.kind == "folder":
        return Folder(origin, skip_bad, spec.text.separator)
    if origin.kind == "shards":
        return Shards(origin, Path(index_dir), skip_bad)
    if origin.kind == "dataset":
        return (Streamed if origin.streaming else DataSet)(origin, skip_bad)
    if origin.kind == "urls":
        return Addresses(origin, Path(index_dir), skip_bad)
    raise UserError(f"{origin.flag}: there is no kind of data set called {origin.kind!r}")
