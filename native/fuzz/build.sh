#!/bin/bash
# build.sh [NAME...]: build the fuzz targets native/fuzz/fuzz_NAME.c (all without a NAME) into build/fuzz/fuzz_NAME.
# A target says in a line " * link: FILE..." which C files under native/ it links, in " * define: MACRO" what it wants
# defined, in " * seeds: SCRIPT" which script beside it writes its seeds, to build/fuzz/seeds_NAME. Run: build/fuzz/fuzz_NAME -max_total_time=60 CORPUS SEEDS
set -e
cd "$(dirname "$0")/../.."
out=build/fuzz
mkdir -p $out
flags="-std=gnu11 -g -O1 -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined"
[ $# -gt 0 ] || set -- $(ls native/fuzz/fuzz_*.c | sed 's|.*/fuzz_||; s|\.c$||')
for name; do
    source=native/fuzz/fuzz_$name.c
    link=$(sed -n 's|^ \* link: ||p' "$source")
    seeds=$(sed -n 's|^ \* seeds: ||p' "$source" | tr -d '*/ ')
    define=$(sed -n 's|^ \* define: ||p' "$source")
    ${CLANG:-clang-14} $flags -Wall -Wextra -Wno-unused-parameter -pthread -Inative -Itests/native ${define:+-D$define} \
        "$source" $(printf 'native/%s ' $link) -o "$out/fuzz_$name"
    [ -z "$seeds" ] || python3 "native/fuzz/$seeds" "$out/seeds_$name"
    echo "$out/fuzz_$name"
done
