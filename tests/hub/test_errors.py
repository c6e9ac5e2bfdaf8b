import pytest

from tacq_vllm.hub.errors import HubError, hub_errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (HubError("a line"), "a line"),
        (OSError("No space left\non device"), "org/x: No space left on device"),
        (ValueError("bad\n\nmetadata"), "org/x: bad metadata"),
        (
            RuntimeError("Error while uploading 'a' to the Hub."),
            "org/x: Error while uploading 'a' to the Hub; the same command goes on "
            "where this one stopped",
        ),
        (
            ConnectionError("Network error: reset"),
            "org/x: no connection to the Hub: Network error: reset; the same command "
            "goes on where this one stopped",
        ),
        (TimeoutError(), "org/x: TimeoutError"),
    ],
)
def test_one_line(error: Exception, line: str) -> None:
    with pytest.raises(HubError) as refusal, hub_errors("org/x"):
        raise error

    assert str(refusal.value) == line
