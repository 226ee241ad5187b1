"""The page that shows the engines, and what it reads."""
