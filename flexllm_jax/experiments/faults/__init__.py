"""A server under random faults: is anything lost, and do jobs end as undisturbed ones do?"""
