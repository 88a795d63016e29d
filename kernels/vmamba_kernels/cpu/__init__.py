from .scan import cross_selective_scan, selective_scan
OPERATORS = {"cross_selective_scan": cross_selective_scan, "selective_scan": selective_scan}
def why_not(call): return None if call.device.type == "cpu" and call.dtype != __import__("torch").float64 else "x"
