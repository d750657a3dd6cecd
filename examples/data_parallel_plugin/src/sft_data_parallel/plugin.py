"""The plugin: no paddle is imported before a run needs the strategy."""

import sft


class DataParallelism(sft.Plugin):
    """Each process that a launcher has started reads its share of a step's rows."""

    name = "data-parallel"
    api_version = 1
    summary = "Processes share the rows of a step."

    @sft.hookimpl
    def sft_parallel_strategy(self, run):
        from sft_data_parallel.strategy import DataParallel

        return DataParallel()
