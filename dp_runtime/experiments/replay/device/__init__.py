"""Recorded requests on real ranks, under the policies of their run or under others."""
