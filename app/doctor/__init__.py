"""`oneinbox-broker doctor`: checks of this broker's set-up, and probes of a deployed one."""
