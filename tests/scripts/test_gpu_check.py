"""What `make gpu-check` would run is what the commands take; without a GPU it says so."""

import pytest
import torch

from benchmarks import ways
from e3va_cli.composition import checked
from e3va_cli.config import register_schemas
from scripts import gpu_check


def test_the_commands_take_the_words():
    register_schemas()
    runs = gpu_check.benchmarks()
    assert len(runs) == 16
    for name in ("swin_l_within_11gib", "swin_l_in_16_bits", "voc_retinanet_swin_l_compiled"):
        checked("benchmark_memory", runs[name])
    for script, *words in gpu_check.profiles().values():
        assert (gpu_check.ROOT / script).is_file()
        given = ways.parser(None, "").parse_intermixed_args(words)
        assert given.size in ((800, 1333), (600, 1000)) and given.ways.startswith("full,frozen,e3va,")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        gpu_check.main()
