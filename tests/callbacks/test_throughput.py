"""Speed and waiting time of a training."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from callbacks.metrics_file import MetricsFile, read_metrics
from callbacks.throughput import Throughput, count_images
from tests.callbacks.tiny import Tiny, loader, trainer


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [row for row in read_metrics(folder / "metrics.csv") if "time/step_ms" in row]


def test_a_slow_loader_is_seen_as_waiting(tmp_path: Path) -> None:
    t = trainer(tmp_path, logger=MetricsFile(tmp_path), callbacks=[Throughput()], log_every_n_steps=4)
    # 4 samples a batch, 5 ms each, and 20 ms of computing: half of the time is waiting.
    t.fit(Tiny(sleep=0.02), loader(48, 4, seconds=0.005))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [3, 7, 11]
    for row in rows[:2]:  # the last window's prefetch has nothing more to fetch
        assert 38 < row["time/step_ms"] < 120
        assert 0.2 < row["time/data_wait"] < 0.75
        assert row["time/images_per_second"] == pytest.approx(4000 / row["time/step_ms"])
        assert "time/gpu_memory_gib" not in row


def test_validation_is_not_counted(tmp_path: Path) -> None:
    class SlowValidation(Tiny):
        def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            time.sleep(0.2)

    t = trainer(
        tmp_path,
        logger=MetricsFile(tmp_path),
        callbacks=[Throughput()],
        log_every_n_steps=4,
        val_check_interval=2,
        num_sanity_val_steps=0,
    )
    t.fit(SlowValidation(sleep=0.01), loader(48, 4), loader(4, 4))
    rows = rows_of(tmp_path)
    assert len(rows) == 3
    assert all(row["time/step_ms"] < 100 for row in rows)


def test_an_accumulated_step_counts_all_its_images(tmp_path: Path) -> None:
    t = trainer(
        tmp_path, logger=MetricsFile(tmp_path), callbacks=[Throughput()], log_every_n_steps=2, accumulate_grad_batches=2
    )
    t.fit(Tiny(sleep=0.01), loader(32, 4))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 3]
    assert rows[1]["time/images_per_second"] == pytest.approx(8000 / rows[1]["time/step_ms"])


def test_images_are_counted_in_each_kind_of_batch() -> None:
    assert count_images({"image": torch.zeros(5, 3, 2, 2)}) == 5
    assert count_images({"image": [torch.zeros(3, 2, 2)] * 3}) == 3
    assert count_images({"content": torch.zeros(2, 3, 2, 2), "style": torch.zeros(2, 3, 2, 2)}) == 2
    assert count_images([torch.zeros(4)]) == 0


def test_a_step_costs_less_than_twenty_microseconds() -> None:
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))
    fake: Any = SimpleNamespace(global_step=0, log_every_n_steps=10**9, fit_loop=loop)
    module, batch = pl.LightningModule(), {"image": torch.zeros(8, 3, 2, 2)}
    callback = Throughput()
    best = float("inf")
    for _ in range(5):  # the best of five: other processes share the machine
        start = time.perf_counter()
        for i in range(2000):
            fake.global_step = i
            callback.on_train_batch_start(fake, module, batch, i)
            callback.on_train_batch_end(fake, module, None, batch, i)
        best = min(best, (time.perf_counter() - start) / 2000)
    assert best < 20e-6
    print(f"{1e6 * best:.1f} us a step")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_memory_is_logged(tmp_path: Path) -> None:
    t = trainer(tmp_path, accelerator="gpu", logger=MetricsFile(tmp_path), callbacks=[Throughput()])
    t.fit(Tiny(), loader(32, 4))
    assert all(0 < row["time/gpu_memory_gib"] < 1 for row in rows_of(tmp_path))
