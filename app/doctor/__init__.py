"""`oneinbox-broker doctor`: is this broker set up right, and does a deployed one refuse what it must?"""

from app.doctor.diagnosis import diagnose
from app.doctor.findings import Finding, all_ok, as_json, as_text
from app.doctor.probe import probe
from app.doctor.prudence import cautions

__all__ = ["Finding", "all_ok", "as_json", "as_text", "cautions", "diagnose", "probe"]
