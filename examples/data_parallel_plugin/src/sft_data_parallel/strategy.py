"""Data parallelism, as docs/strategies.md shows it."""

from dataclasses import replace

import paddle
from paddle import distributed

from sft.parallel import SingleProcess


class DataParallel(SingleProcess):
    def __init__(self):
        distributed.init_parallel_env()
        self.data_rank = self.draw_rank = distributed.get_rank()
        self.data_world = distributed.get_world_size()
        self.is_main = self.data_rank == 0

    def connect(self, model):
        self.trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]

    def accumulate(self, learning, batches):
        loss = super().accumulate(learning, batches)
        for parameter in self.trained:
            if parameter.grad is None:  # a pass's last step may have no row for this process
                parameter.grad = paddle.zeros(parameter.shape, "float32")
            distributed.all_reduce(parameter.grad)
        return loss

    def sum(self, values):
        return self._reduced(values, distributed.ReduceOp.SUM)

    def largest(self, value):
        return self._reduced([value], distributed.ReduceOp.MAX)[0]

    def wait(self):
        self.sum([0.0])

    def _reduced(self, values, operation):
        tensor = paddle.to_tensor(list(values), "float64")
        distributed.all_reduce(tensor, operation)
        return tensor.tolist()

    def own_file(self, stem):
        return f"{stem}-{self.data_rank}"

    def pieces(self, stepped):
        return {name: replace(piece, written=self.is_main) for name, piece in super().pieces(stepped).items()}
