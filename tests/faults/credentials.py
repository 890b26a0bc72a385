"""Credentials in the AWS SDK's file instead of environment variables."""

from pathlib import Path

import pytest

__all__ = ["without_keys", "written"]


def without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the keys from the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)


def written(file: Path, key: str, profile: str = "default") -> None:
    """Write a credentials file with one profile."""
    keys = f"aws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t-{key}\n"
    file.write_text(f"[{profile}]\n{keys}")
