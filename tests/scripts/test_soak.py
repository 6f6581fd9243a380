"""Growth is noticed, and samples have memory, files and threads."""

import mmap
import os
import tempfile
import threading

import pytest

from scripts.soak import Sample, growth, sample, table


def run(*, own=0.0, files=0.0, threads=0.0):
    """2,000 steps with a large warm-up; then growth per 1,000 steps."""
    steps = range(0, 2000, 10)
    return [
        Sample(
            step,
            rss_mib=900.0,
            private_mib=100 + min(step, 400) + (step % 3) + own * step / 1000,
            files=5 + round(files * step / 1000) + 2 * (step % 100 == 0),
            threads=3 + round(threads * step / 1000),
        )
        for step in steps
    ]


@pytest.mark.parametrize(
    ("leak", "grown"),
    [({}, []), ({"own": 6.0}, ["private memory"]), ({"files": 4.0}, ["files"]), ({"threads": 4.0}, ["threads"])],
)
def test_growth_after_warm_up_and_noise(leak, grown):
    samples = run(**leak)
    lines, growing = growth(samples, every=200, bound_mib=4.0)
    assert [line.partition(":")[0] for line in lines] == ["private memory", "files", "threads"]
    assert [line.partition(":")[0] for line in growing] == grown
    assert len(table(samples, 200).splitlines()) == 2 + 10


def test_a_run_that_is_too_short():
    with pytest.raises(ValueError, match="nothing to compare"):
        growth(run()[:50], every=200, bound_mib=4.0)


def test_a_sample_sees_memory_files_and_threads():
    before = sample(os.getpid(), 0)
    held, stop = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), threading.Event()
    held.write(bytes(64 * 2**20))  # not from what the process had before
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with tempfile.TemporaryFile(), tempfile.TemporaryFile():
        after = sample(os.getpid(), 7)
    stop.set()
    thread.join()
    held.close()
    assert after.step == 7
    assert (after.files - before.files, after.threads - before.threads) == (2, 1)
    assert 60 < after.private_mib - before.private_mib < 80 and after.rss_mib >= after.private_mib


def test_a_process_that_ended():
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert sample(pid, 0) is None
