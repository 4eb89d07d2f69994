//! A few seconds of chaos; the program itself goes on for as long as it is told, with everything that ranks do together.

use std::process::Command;

#[test]
fn killed_and_stopped_ranks_are_told_of_and_leave_nothing_behind() {
    for work in ["exchange", "collectives"] {
        let options = ["--seed", "1", "--first", "2", "--kills", "10", "--seconds", "3", "--ranks", "6", "--one-node"];
        let mut chaos = Command::new(env!("CARGO_BIN_EXE_chaos"));
        let output = chaos.args(options).args(["--work", work]).output().expect("the program starts");
        let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{said}{complained}");
    }
}
