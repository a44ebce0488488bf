"""Writing a file as a whole: what stands at its place decides how."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from vlm_reason.atomic import write_atomically


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """As /dev/stdout and /dev/null: a file in their place would break every program of the machine."""
    pipe, content = tmp_path / "pipe", b"x" * 200_000  # more than a pipe holds
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, content)
    reader.join(10)
    assert read == [content] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_link_stays_a_link_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_a_folder_is_an_error_that_names_it_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_atomically(tmp_path / "folder", "x")
    assert error.value.filename == str(tmp_path / "folder") and os.listdir(tmp_path) == ["folder"]
