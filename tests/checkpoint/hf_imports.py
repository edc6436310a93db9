"""Imports of tiny folders, without parity."""

import pytest

from ttt_lit.checkpoint.importing import import_checkpoint


def run(folder, tmp_path, quiet, **options):
    return import_checkpoint(str(folder), str(tmp_path / "out"), parity=False, console=quiet, **options)


def refused(folder, tmp_path, quiet, match, **options):
    """The import fails with one line and leaves nothing behind."""
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
        run(folder, tmp_path, quiet, **options)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
