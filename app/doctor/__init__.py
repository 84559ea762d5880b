"""`oneinbox-broker doctor`: is this broker set up right, and does a deployed one refuse what it must?"""
