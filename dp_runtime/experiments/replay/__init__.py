"""Recorded steps under other policies: on a device, or in a fitted cost model without one."""
