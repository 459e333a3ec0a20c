"""What `bench.kernels` times. Run by `test_in_interpreter`.

Not beside the kernels' own cases: those run on machines that lack what the benchmark's command line needs.
"""

import pytest
import torch

from bench import kernels


@pytest.mark.parametrize("statistic", kernels.STATISTICS)
def test_what_the_benchmark_times_is_attention(statistic):
    case, cpu, outs = kernels.Case(4, 2, 16, 2, 48), torch.device("cpu"), []
    for make in (kernels._sdpa, kernels.ours(statistic)):
        torch.manual_seed(1)
        outs.append(make(case, cpu)())
    dense_BHD, ours_BHD = outs[0][:, :, 0], outs[1][0].flatten(1, 2)
    torch.testing.assert_close(ours_BHD.float(), dense_BHD.float(), atol=2e-2, rtol=2e-2)
