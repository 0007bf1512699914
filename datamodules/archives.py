"""Download published archives from mirrors and verify their checksums."""

from __future__ import annotations

import os
import tarfile
from typing import Any, NamedTuple

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torchvision.datasets.utils import check_md5

from errors import UserError


class Archive(NamedTuple):
    """A tar archive that several hosts offer.

    Attributes:
        hosts: URLs, tried in order.
        path: path of the archive relative to a host.
        md5: checksum of the archive.
    """

    hosts: tuple[str, ...]
    path: str
    md5: str

    def instructions(self, folder: str) -> str:
        """Return one line that tells the user what to download and how to unpack it in ``folder``."""
        urls = " or ".join(f"{host}/{self.path}" for host in self.hosts)
        return (
            f"download {urls} (MD5 {self.md5}) and unpack it in {folder}: "
            f"tar -xf {os.path.basename(self.path)} -C {folder}"
        )

    def download(self, folder: str) -> None:
        """Download the archive from the first host that has it, verify it and unpack it in ``folder``.

        An archive that is already in ``folder`` with the right checksum is not downloaded again.

        Raises:
            UserError: no host offers the right file.
        """
        target = os.path.join(folder, os.path.basename(self.path))
        os.makedirs(folder, exist_ok=True)
        if not (os.path.isfile(target) and check_md5(target, self.md5)):
            self._download_to(target, folder)
        # Python before 3.11.4 has no extraction filters. The checksum vouches for the content.
        options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with tarfile.open(target) as tar:
            tar.extractall(folder, **options)

    def _download_to(self, target: str, folder: str) -> None:
        failures = []
        for host in self.hosts:
            rank_zero_info(f"downloading {host}/{self.path}")
            try:
                torch.hub.download_url_to_file(f"{host}/{self.path}", target + ".part")
            except OSError as error:
                failures.append(f"{host}: {error}")
                continue
            if check_md5(target + ".part", self.md5):
                os.replace(target + ".part", target)
                return
            failures.append(f"{host}: wrong MD5 checksum")
            os.unlink(target + ".part")
        raise UserError(f"download: no host offers the archive ({'; '.join(failures)}); {self.instructions(folder)}")
