"`python -m explaind_nb` is the console script `explaind_nb`."
from explaind_nb.cli import main

if __name__ == "__main__": main()
