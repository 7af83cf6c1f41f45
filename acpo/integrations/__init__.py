"""The method inside other training frameworks. Each module needs its framework and is imported by its own name; `functional` needs torch alone."""
