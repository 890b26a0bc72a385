from pathlib import Path

import pytest

from nucleus.errors import IntegrityError
from nucleus.storage.files import check_sums, write_sums


def test_sums_name_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("state.json", "model/weights.h5"):
        (tmp_path / name).write_text(name)
    with pytest.raises(IntegrityError, match="s3://b/c"):
        check_sums(tmp_path, "s3://b/c")
    write_sums(tmp_path)
    check_sums(tmp_path, "s3://b/c")
    for name in ("state.json", "model/weights.h5"):
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content[:-1] + "?")
        with pytest.raises(IntegrityError, match=rf"s3://b/c .*: {name}\."):
            check_sums(tmp_path, "s3://b/c")
        (tmp_path / name).unlink()
        with pytest.raises(IntegrityError, match=rf": {name}\."):
            check_sums(tmp_path, "s3://b/c")
        (tmp_path / name).write_text(content)
    (tmp_path / "more.py").write_text("print()")
    with pytest.raises(IntegrityError, match=r": more\.py\."):
        check_sums(tmp_path, "s3://b/c")
    (tmp_path / "sums.json").write_text("[" * 100_000)
    with pytest.raises(IntegrityError, match="s3://b/c"):
        check_sums(tmp_path, "s3://b/c")
