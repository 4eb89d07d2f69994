//! The binary interface is the one that was promised: every exported symbol, and the size, alignment, offset or value of all
//! that the header declares, as a compiler sees it, compared with the list of this version in `abi/`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use xccl_tests::{exported_functions, succeeds};

fn crate_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The header without comments, continued lines joined.
fn header() -> String {
    let mut text = std::fs::read_to_string(crate_dir().join("../include/xccl.h")).expect("include/xccl.h");
    while let Some(begin) = text.find("/*") {
        let end = begin + text[begin..].find("*/").expect("a comment's end") + 2;
        text.replace_range(begin..end, "");
    }
    text.replace("\\\n", " ")
}

/// The last word of a declaration.
fn name_of(declaration: &str) -> &str {
    let declared = declaration.split(['[', '=', '(']).next().unwrap_or_default().trim();
    declared.rsplit(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()
}

/// A C program that prints what its compiler makes of the header, one fact per line.
fn program(header: &str) -> String {
    let mut lines = vec![];
    let mut print =
        |what: String, value: &str| lines.push(format!("  printf(\"{what} %lld\\n\", (long long)({value}));"));
    for define in header.lines().filter_map(|line| line.strip_prefix("#define ")) {
        // Those that are numbers.
        if let Some((name, value)) = define.split_once(' ')
            && value.trim().parse::<i64>().is_ok()
        {
            print(format!("constant {name}"), name);
        }
    }
    for part in header.split("typedef ").skip(1) {
        // Opaque structs and pointers to functions have nothing that could move.
        let Some((head, body)) = part.split_once('{').filter(|(head, _)| !head.contains(';')) else { continue };
        let (body, tail) = body.split_once('}').expect("a type's end");
        let name = tail.split(';').next().unwrap_or_default().trim();
        print(format!("size {name}"), &format!("sizeof({name})"));
        match head.trim() {
            "enum" => {
                for value in body.split(',').map(name_of).filter(|value| !value.is_empty()) {
                    print(format!("value {name}.{value}"), value);
                }
            }
            _ => {
                print(format!("align {name}"), &format!("offsetof(struct {{ char c; {name} x; }}, x)"));
                for field in body.split(';').map(name_of).filter(|field| !field.is_empty()) {
                    print(format!("offset {name}.{field}"), &format!("offsetof({name}, {field})"));
                    print(format!("size {name}.{field}"), &format!("sizeof((({name} *)0)->{field})"));
                }
            }
        }
    }
    format!("#include <stdio.h>\n#include \"xccl.h\"\nint main(void) {{\n{}\n  return 0;\n}}\n", lines.join("\n"))
}

fn declared(header: &str) -> BTreeSet<String> {
    let starts = header.match_indices("xccl").filter_map(|(at, _)| {
        let word: String = header[at..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        let is_whole = !header[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        (is_whole && header[at + word.len()..].starts_with('(')).then_some(word)
    });
    starts.collect()
}

#[test]
fn the_binary_interface_is_the_one_of_this_version() {
    let header = header();
    let (declared, exported) = (declared(&header), exported_functions());
    assert_eq!(declared, exported, "what the header declares is what the library exports");

    let dir = tempfile::tempdir().expect("a temporary folder");
    let (source, built) = (dir.path().join("abi.c"), dir.path().join("abi"));
    std::fs::write(&source, program(&header)).expect("a source file");
    succeeds(Command::new("cc").arg("-I").arg(crate_dir().join("../include")).arg(&source).arg("-o").arg(&built));
    let symbols: String = exported.iter().map(|name| format!("symbol {name}\n")).collect();
    let found = symbols + &succeeds(&mut Command::new(built));

    // Before 1.0 a minor version may change the interface, so each has a list of its own.
    let version = concat!(env!("CARGO_PKG_VERSION_MAJOR"), ".", env!("CARGO_PKG_VERSION_MINOR"));
    let list: PathBuf = crate_dir().join("abi").join(format!("{version}.txt"));
    if std::env::var_os("XCCL_UPDATE_ABI").is_some() {
        std::fs::write(&list, &found).expect("abi/ can be written");
    }
    let promised = std::fs::read_to_string(&list).unwrap_or_default();
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (found, promised) = (lines(&found), lines(&promised));
    let gone: Vec<_> = promised.difference(&found).collect();
    let new: Vec<_> = found.difference(&promised).collect();
    assert!(
        gone.is_empty() && new.is_empty(),
        "the binary interface differs from abi/{version}.txt.\npromised, but not found: {gone:#?}\nfound, but not promised: \
         {new:#?}\nUndo the change, or raise the version (before 1.0: the minor one) and write the new list:\n\
         XCCL_UPDATE_ABI=1 cargo test -p xccl-sys --test abi"
    );
}
