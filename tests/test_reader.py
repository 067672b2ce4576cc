"""What a Reader fetches of a file that was made to harm."""

import tracemalloc
import zipfile

import pytest

from igpt_fast import reader
from igpt_fast.errors import InputError
from igpt_fast.sources import open_source


def test_a_zip_unpacks_no_more_than_it_says_and_than_an_image_has(tmp_path, monkeypatch):
    path, names = tmp_path / "bomb.zip", ("a.png", "b.png")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, bytes(1 << 20))
    data = bytearray(path.read_bytes())
    size = data.index(b"PK\1\2") + 24
    data[size : size + 4] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    source = open_source(path)
    monkeypatch.setattr(reader, "MOST", 1 << 16)
    for i, (name, reason) in enumerate(zip(names, ("its checksum", "it unpacks to 1,048,576 bytes"), strict=True)):
        tracemalloc.start()
        with pytest.raises(
            InputError, match=rf"bomb\.zip: {name}: cannot be read \({reason}.*mend or remove the file$"
        ):
            source.read(i)
        assert tracemalloc.get_traced_memory()[1] < 1 << 19
        tracemalloc.stop()
