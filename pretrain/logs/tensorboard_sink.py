"""A run's numbers in TensorBoard."""


class TensorBoard:
    """Numbers of each step under their names.

    After a restart, steps that are done again are not shown twice.
    """

    def __init__(self, folder: str, last_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops what earlier files say of purge_step and later ones.
        self.writer = SummaryWriter(folder, purge_step=last_step + 1)

    def log(self, values: dict[str, float | str | bool], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)
        # A killed run does not come back to write what it had before its last checkpoint.
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
