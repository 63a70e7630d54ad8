import hashlib
import sys

import pytest

from t5x_audio.audio import model_files
from t5x_audio.errors import UserError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that must never be imported, with a weight file."""
    folder = tmp_path / "carries_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "models" / "w.bin").write_bytes(b"weights")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "carries_weights"


DIGEST = hashlib.sha256(b"weights").hexdigest()


def find(package, file="models/w.bin", digest=DIGEST):
    return model_files.find_model_file(package, file, digest, "carries-weights==1")


def test_finds_the_file_without_importing_its_package(package):
    assert find(package).read_bytes() == b"weights"
    assert package not in sys.modules


@pytest.mark.parametrize(
    ("kwargs", "culprit"),
    [
        ({"package": "no_such_package_here"}, "no_such_package_here is not installed"),
        ({"file": "models/other.bin"}, "other.bin: cannot be read"),
        ({"digest": "0" * 64}, "unexpected content"),
    ],
)
def test_faults_name_the_culprit_and_the_cure(package, kwargs, culprit):
    with pytest.raises(UserError, match=culprit) as error:
        find(**{"package": package, **kwargs})
    assert "carries-weights==1" in str(error.value)
