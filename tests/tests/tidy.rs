//! The house rules hold for the tree as it is. That each rule bites is proven beside it, in `ridge_tests::tidy`.

use ridge_tests::tidy::{Tree, complaints};
use std::path::Path;

#[test]
fn the_house_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let tree = Tree::read(&root).expect("the sources are readable");
    assert!(tree.members().len() >= 10, "the workspace's members were not found");
    assert!(tree.rust().count() > 50, "the sources were not found");
    let complaints = complaints(&tree);
    assert!(complaints.is_empty(), "{} house rules are broken:\n{}", complaints.len(), complaints.join("\n"));
}
