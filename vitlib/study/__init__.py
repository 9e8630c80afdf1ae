"""What a study is: parameters, variants, records and files. No torch."""
