"""What is made of runs and messages after the fact: reports and plots."""
