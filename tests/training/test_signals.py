import os
import signal

import pytest

from megatron_zebra.training.signals import stop_signals


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_is_for_a_process_of_its_own_unless_its_shell_has_it_ignored(
    ignored: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        with stop_signals(alone=True) as came:
            os.kill(os.getpid(), signal.SIGINT)
            assert came() is not ignored
        assert ("Ctrl-C again ends at once" in capfd.readouterr().err) is not ignored
        assert signal.getsignal(signal.SIGINT) is (signal.SIG_IGN if ignored else signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, former)
