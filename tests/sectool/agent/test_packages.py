"""dpkg's file lists: owners and versions of program files."""

from __future__ import annotations

import os
from pathlib import Path

from sectool.agent.packages import Packages

STATUS = """\
Package: nginx-light
Status: install ok installed
Maintainer: somebody
Version: 1.22.1-9
Description: small

Package: libc6
Status: install ok installed
Version: 2.36-9
"""


def database(folder: Path) -> Path:
    (folder / "info").mkdir()
    (folder / "info" / "nginx-light.list").write_text("/.\n/usr\n/usr/sbin\n/usr/sbin/nginx\n")
    (folder / "info" / "libc6:amd64.list").write_text("/.\n/lib/ld.so")
    (folder / "info" / "old.list").write_text("/bin/tool\n")
    (folder / "status").write_text(STATUS)
    return folder


def test_owner_and_version(tmp_path: Path) -> None:
    found = Packages(database(tmp_path)).owners(
        ["/usr/sbin/nginx", "/usr/sbin/ngin", "/sbin/nginx", "/opt/x"]
    )
    assert found == {
        "/usr/sbin/nginx": "nginx-light 1.22.1-9",
        "/usr/sbin/ngin": "",
        "/sbin/nginx": "",
        "/opt/x": "",
    }


def test_lists_of_before_the_merge_of_usr(tmp_path: Path) -> None:
    assert Packages(database(tmp_path)).owners(["/usr/bin/tool", "/opt/bin/tool"])["/usr/bin/tool"] == "old"


def test_a_system_without_dpkg_has_no_owners(tmp_path: Path) -> None:
    assert Packages(tmp_path / "nothing").owners(["/usr/bin/x"]) == {"/usr/bin/x": ""}


def test_answers_are_remembered_until_dpkg_works(tmp_path: Path) -> None:
    packages = Packages(database(tmp_path))
    packages.owners(["/usr/sbin/nginx"])
    assert packages.known("/usr/sbin/nginx") == "nginx-light 1.22.1-9"
    os.utime(tmp_path / "status", ns=(1, 1))
    assert packages.known("/usr/sbin/nginx") is None
