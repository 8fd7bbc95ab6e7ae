"""Which of several runs in one output folder may write there."""

import pytest

from megatron_cocoa.training.output_owner import STARTS_FILE, OutputOwner, TakenOver

ONE, OTHER = "1" * 32, "2" * 32


def claimed(folder, *launchers: str) -> OutputOwner:
    owner = OutputOwner(folder, launchers)
    owner.claim()
    return owner


def test_the_last_start_has_the_folder(tmp_path):
    """Claim: whoever was there before is told so, at every look; whether it lives makes no difference to the last."""
    first, second, third = (claimed(tmp_path) for _ in range(3))
    for _ in range(2):
        for earlier in (first, second):
            with pytest.raises(TakenOver, match=f"another run has started in output_dir {tmp_path} .* --resume true"):
                earlier.check()
        third.check()


def test_a_process_that_claims_no_folder_is_refused_nothing(tmp_path):
    """Claim: what trains a stage by itself, outside of a run, needs no claim; a file where the folder should be is
    left to the check of the folder, which says so."""
    (tmp_path / "file").write_text("")
    for name in ("absent", "file"):
        owner = OutputOwner(tmp_path / name)
        owner.check_restart()
        owner.check()


def test_a_start_that_was_killed_in_its_line_spoils_no_other(tmp_path):
    """Claim: neither the next start nor the looks of the last one trip over half a line, and the earlier run ends."""
    first = claimed(tmp_path)
    for half in (b"\n", b"\n1234", b"\n\xff\0"):
        with (tmp_path / STARTS_FILE).open("ab") as file:
            file.write(half)
        with pytest.raises(TakenOver):
            first.check()
        claimed(tmp_path).check()


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    """Claim: a run whose folder somebody has removed, perhaps to start anew, does not write into the new one."""
    owner = claimed(tmp_path)
    (tmp_path / STARTS_FILE).unlink()
    with pytest.raises(TakenOver, match="somebody has removed"):
        owner.check()


def test_a_launcher_does_not_take_back_what_it_has_left(tmp_path):
    """Claim: torchrun's restart of a run that was taken over is refused and leaves no trace; any other start is not."""
    claimed(tmp_path, ONE)
    claimed(tmp_path, ONE).check()
    newer = claimed(tmp_path, OTHER)
    restarted = OutputOwner(tmp_path, [ONE])
    for refuses in (restarted.check_restart, restarted.claim):
        with pytest.raises(TakenOver, match="torchrun has restarted a run that has left"):
            refuses()
    newer.check()
    OutputOwner(tmp_path, [OTHER]).check_restart()
    claimed(tmp_path, OTHER)
    # A launcher that has not come as far as to claim the folder, and starts without one: in a shell, one after another.
    claimed(tmp_path, "3" * 32)
    claimed(tmp_path)
    claimed(tmp_path).check()


def test_a_run_on_several_nodes_is_known_whichever_has_the_first_rank(tmp_path):
    """Claim: nodes that join and are lost let a run restart; none of its nodes takes back what it was taken from.

    torchrun counts ranks by the nodes' addresses, so a node that joins may get the first rank from one that stays.
    """
    joining = "3" * 32
    claimed(tmp_path, ONE, OTHER)
    claimed(tmp_path, joining, ONE, OTHER)
    claimed(tmp_path, ONE, OTHER)
    claimed(tmp_path, OTHER, ONE)
    claimed(tmp_path, "4" * 32)
    for launchers in ([ONE, OTHER], [OTHER, ONE]):
        with pytest.raises(TakenOver, match="torchrun has restarted a run that has left"):
            OutputOwner(tmp_path, launchers).check_restart()


def test_starts_at_the_same_moment_leave_one_owner(tmp_path):
    """Claim: where two hosts append at the same place, as on NFS, the line that stays is whole and its run's own."""
    path = tmp_path / STARTS_FILE
    claimed(tmp_path)
    before = path.read_bytes()
    one = claimed(tmp_path, ONE)
    path.write_bytes(before)
    other = claimed(tmp_path)
    with path.open("r+b") as file:
        file.seek(len(before))
        file.write(f"\n{one._line}".encode())
    one.check()
    with pytest.raises(TakenOver):
        other.check()
