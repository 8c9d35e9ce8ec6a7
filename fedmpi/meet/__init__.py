"""Where messages meet: the ways in which they become their mean, and what adds them up."""
