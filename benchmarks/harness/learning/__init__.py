"""What suites that compare learning curves share: runs in processes, tuned rates, intervals, tables and curves."""
