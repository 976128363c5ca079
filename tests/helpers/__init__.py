"""What tests share: runs and models to test on, judges of their numbers, processes and pages."""
